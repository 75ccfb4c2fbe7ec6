// The telemetry page: one uPlot chart per metric, one crosshair and one time range for all of them.
const box = document.querySelector("#charts");
const SCALE = { memory: 1 / 2 ** 30, nvlink: 1e-9 };
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]]; // lines differ by more than their colour
const sync = uPlot.sync("telemetry");
const charts = [];

function css(name) {
  // uPlot draws on a canvas, which wants plain colours: let the browser resolve light-dark() and oklch().
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function options(node, data, title) {
  const unit = node.dataset.unit;
  const digits = unit === "GiB" || unit === "GB/s" ? 1 : 0;
  const show = (u, v, i, at) => at == null ? "–" : v == null ? "not reported" : `${v.toFixed(digits)} ${unit}`;
  const axis = { stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui" };
  return {
    title: undefined,
    width: node.clientWidth,
    height: 190,
    cursor: { sync: { key: sync.key }, drag: { x: true, y: false } },
    scales: { y: { range: (u, min, max) => [0, Math.max(max ?? 1, 1) * 1.08] } },
    axes: [axis, { ...axis, size: 52 }],
    series: [
      { value: (u, v) => v == null ? "–" : new Date(v * 1000).toLocaleString() },
      ...data.series.map((s, i) => ({
        label: `GPU ${s.gpu}`, stroke: css(`--series-${i % 4 + 1}`), width: 1.5, dash: DASHES[i % 4], value: show, spanGaps: false,
        points: { show: false },
      })),
    ],
    hooks: {
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        const from = Math.floor(u.posToVal(u.select.left, "x"));
        const to = Math.ceil(u.posToVal(u.select.left + u.select.width, "x"));
        const query = new URLSearchParams(location.search);
        query.delete("range");
        query.set("start", from);
        query.set("end", to);
        location.search = query; // the range is in the address: it can be shared and undone
      }],
    },
  };
}

async function load(node) {
  const query = new URLSearchParams({ metric: node.dataset.metric });
  if (box.dataset.range) query.set("range", box.dataset.range);
  else { query.set("start", box.dataset.start); query.set("end", box.dataset.end); }
  if (box.dataset.gpu) query.set("gpu", box.dataset.gpu);
  const note = node.closest("section").querySelector("[data-note]");
  try {
    const answer = await fetch(`${box.dataset.url}?${query}`, { headers: { Accept: "application/json" } });
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.error.message);
    const scale = SCALE[node.dataset.metric] ?? 1;
    const columns = [data.times, ...data.series.map((s) => s.values.map((v) => v == null ? null : v * scale))];
    const known = data.series.some((s) => s.values.some((v) => v != null));
    note.textContent = known ? `means of ${data.step_seconds < 60 ? `${data.step_seconds} s` : `${Math.round(data.step_seconds / 60)} min`}` : "nothing stored in this range yet";
    return { node, data, columns };
  } catch (error) {
    note.textContent = `Not loaded: ${error.message}`;
    return null;
  }
}

function draw({ node, data, columns }) {
  const old = charts.findIndex((c) => c.node === node);
  if (old >= 0) {
    const chart = charts[old].chart;
    if (chart.series.length === columns.length) { charts[old].data = data; chart.setData(columns); return; }
    chart.destroy();
    charts.splice(old, 1);
  }
  const chart = new uPlot(options(node, data), columns, node);
  charts.push({ node, chart, data });
}

async function refresh() {
  if (document.hidden) return;
  for (const loaded of await Promise.all([...box.querySelectorAll("[data-metric]")].map(load))) if (loaded) draw(loaded);
}

addEventListener("resize", () => charts.forEach(({ node, chart }) => chart.setSize({ width: node.clientWidth, height: 190 })));
document.addEventListener("themechange", () => {
  for (const { node, chart } of charts.splice(0)) { chart.destroy(); node.replaceChildren(); }
  refresh();
});
document.querySelector("#range").addEventListener("change", (event) => event.currentTarget.requestSubmit());
if (box.dataset.range) setInterval(refresh, 10000);
refresh();
