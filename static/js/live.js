// Live cards: numbers, bars and sparklines from /ws/telemetry/, drawn once per animation frame.
import { connect } from "./socket.js";

const GIB = 2 ** 30;
const SPARK_POINTS = 60;
const NONE = "not reported";
let fields = {};
let uuids = [];
let frame = null;
let drawn = null;
let frameAge = Infinity; // of the frame when it came, by the server's clock
let cameAt = 0; // performance.now() then
let clockOffset = 0; // server's seconds less ours
let staleAfter = 5;
let sparks = []; // per card, one value a second
let sparkAt = 0;
let asked = 0;

const whole = (v) => String(Math.round(v)).replace(/\B(?=(\d{3})+$)/g, "\u2009");
const withUnit = (v, unit) => v == null ? NONE : `${whole(v)}${unit}`;

function set(root, name, text, warn = false) {
  const node = root.querySelector(`[data-f="${name}"]`);
  if (!node) return;
  if (node.textContent !== text) node.textContent = text;
  node.classList.toggle("warn-text", warn);
}

function width(root, name, x, amount, total) {
  const rect = root.querySelector(`[data-w="${name}"]`);
  if (!rect || !total) return x;
  const w = Math.max(0, Math.min(100 - x, 100 * amount / total));
  rect.setAttribute("x", x.toFixed(2));
  rect.setAttribute("width", w.toFixed(2));
  return x + w;
}

function drawCard(card, row) {
  const get = (name) => row[fields[name]];
  if (get("lost")) return; // the page's own region redraws the slot as missing
  const total = Number(card.dataset.total);
  const used = get("memory_used_bytes");
  const process = get("process_memory_bytes");
  const memoryTemp = get("memory_temperature_celsius");
  const temp = get("temperature_celsius");
  set(card, "temp", temp == null ? "–" : `${whole(temp)}°`, temp != null && temp >= Number(card.dataset.hot));
  set(card, "memory", used == null ? NONE : `${(used / GIB).toFixed(1)} / ${(total / GIB).toFixed(1)} GiB`);
  set(card, "busy", withUnit(get("utilization_percent"), " %"));
  const limit = get("power_limit_watts");
  const power = get("power_watts");
  set(card, "power", power == null ? NONE : limit == null ? `${whole(power)} W` : `${whole(power)} / ${whole(limit)} W`);
  set(card, "memory_temp", withUnit(memoryTemp, " °C"), memoryTemp != null && memoryTemp >= 95);
  if (used != null) {
    const weights = Math.min(Number(card.dataset.weights) || 0, process ?? 0);
    let x = width(card, "weights", 0, weights, total);
    x = width(card, "process", x, Math.max(0, (process ?? 0) - weights), total);
    width(card, "rest", x, Math.max(0, used - (process ?? 0)), total);
    card.querySelector("svg.bar")?.setAttribute("aria-valuenow", Math.round(100 * used / total));
  }
}

function drawPower() {
  const box = document.querySelector("#power");
  if (!box) return;
  const values = frame.g.map((row) => row[fields.power_watts]).filter((v) => v != null);
  if (!values.length) return;
  const sum = values.reduce((a, b) => a + b, 0);
  set(box, "total", `${whole(sum)} W`);
  width(box, "power", 0, sum, Number(box.dataset.supply));
  box.querySelector("svg.bar")?.setAttribute("aria-valuenow", Math.round(100 * sum / Number(box.dataset.supply)));
}

function sparkPath(values) {
  const step = 118 / (SPARK_POINTS - 1);
  const start = SPARK_POINTS - values.length;
  let d = "";
  let down = false;
  values.forEach((v, i) => {
    if (v == null) { down = false; return; }
    d += `${down ? "L" : "M"}${((start + i) * step).toFixed(1)} ${(34 - 32 * Math.min(Math.max(v / 100, 0), 1)).toFixed(1)}`;
    down = true;
  });
  return d;
}

function draw() {
  asked = 0;
  if (!frame) return;
  uuids.forEach((uuid, i) => {
    const card = document.querySelector(`[data-gpu="${CSS.escape(uuid)}"]`);
    if (!card || !frame.g[i]) return;
    drawCard(card, frame.g[i]);
    const path = card.querySelector("svg.spark path");
    if (path && sparks[i]) path.setAttribute("d", sparkPath(sparks[i]));
  });
  drawPower();
  drawn = frame;
  showAge();
}

function ask() {
  if (!asked && !document.hidden) asked = requestAnimationFrame(draw);
}

const age = () => frameAge + (performance.now() - cameAt) / 1000;

function showAge() {
  const state = document.querySelector("#live-state");
  if (!state || !drawn) return;
  const stale = age() > staleAfter;
  for (const part of document.querySelectorAll("#cards, #power")) part.classList.toggle("stale", stale);
  const strip = document.querySelector('[data-alert="stale"]'); // drawn by the server when the page was loaded
  if (strip) strip.hidden = !stale;
  const text = stale ? `last seen ${whole(age())} s ago` : "live";
  const word = state.querySelector("[data-word]");
  if (word.textContent !== text) word.textContent = text;
  state.querySelector(".dot").className = `dot ${stale ? "warn" : "ok"}`;
}
setInterval(showAge, 1000);
document.addEventListener("htmx:wsAfterMessage", ask); // a region that was drawn anew gets the newest values

connect("/ws/telemetry/", {
  onMessage(message) {
    if (message.type === "header") {
      fields = Object.fromEntries(message.fields.map((name, i) => [name, i]));
      if (uuids.join() !== message.gpus.join()) sparks = message.gpus.map(() => []);
      uuids = message.gpus;
      clockOffset = message.now - Date.now() / 1000;
      staleAfter = message.stale_after_s;
    } else if (message.type === "history") {
      sparks = message.gpus.map((line) => line.slice(-SPARK_POINTS));
    } else {
      frame = message;
      cameAt = performance.now();
      frameAge = Math.max(0, Date.now() / 1000 + clockOffset - message.t);
      if (message.t - sparkAt >= 0.95) {
        sparkAt = message.t;
        message.g.forEach((row, i) => {
          const line = sparks[i] ??= [];
          line.push(row[fields.utilization_percent]);
          if (line.length > SPARK_POINTS) line.shift();
        });
      }
      document.dispatchEvent(new CustomEvent("telemetry", { detail: { frame, fields, uuids } }));
      ask();
    }
  },
});
