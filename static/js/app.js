// The shell: theme, keys, confirmations, copying, relative times, announcements.
const $ = (selector, root = document) => root.querySelector(selector);

export function announce(text) {
  const region = $("#announcer");
  if (region) region.textContent = text;
}

// --- theme: the server reads the cookie, so that no page flashes in the wrong one ---
$("#theme")?.addEventListener("click", (event) => {
  const button = event.target.closest("button[name=theme]");
  if (!button) return;
  event.preventDefault();
  const theme = button.value;
  document.cookie = `rigpanel_theme=${theme};path=/;max-age=31536000;samesite=lax`;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const other of button.form.querySelectorAll("button[name=theme]"))
    other.setAttribute("aria-pressed", String(other === button));
  document.dispatchEvent(new CustomEvent("themechange"));
});

// --- relative times ---
const size = (s) => s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min`
  : s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} d`;

export function relative(date, now = Date.now()) {
  const s = (now - date) / 1000;
  if (Math.abs(s) < 2) return "just now";
  return s > 0 ? `${size(s)} ago` : `in ${size(-s)}`;
}

function refreshTimes() {
  if (document.hidden) return;
  for (const node of document.querySelectorAll("time[data-rel]")) {
    const at = new Date(node.dateTime);
    const text = relative(at);
    if (node.textContent !== text) node.textContent = text;
    if (!node.dataset.local) { node.title = at.toLocaleString(); node.dataset.local = "1"; }
  }
}
setInterval(refreshTimes, 1000);
refreshTimes();

// --- confirmations: a form or its button with data-confirm asks first, once ---
document.addEventListener("submit", (event) => {
  const form = event.target;
  const button = event.submitter;
  const question = button?.dataset.confirm || form.dataset.confirm;
  if (!question || form.dataset.confirmed) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const dialog = $("#confirm");
  $("#confirm-title").textContent = button?.dataset.confirmTitle || form.dataset.confirmTitle || "Are you sure?";
  $("#confirm-text").textContent = question;
  $("#confirm-yes").textContent = button?.dataset.confirmVerb || form.dataset.confirmVerb || button?.textContent.trim() || "Go on";
  dialog.returnValue = "no";
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "yes") return;
    form.dataset.confirmed = "1";
    form.requestSubmit(button?.isConnected ? button : undefined);
    delete form.dataset.confirmed;
  }, { once: true });
  dialog.showModal();
}, true);

// --- a question that the server asks about a click (components/ask.html) ---
document.addEventListener("htmx:afterSettle", () => $("#ask dialog:not([open])")?.showModal());
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful && event.target.closest("#ask") && !event.detail.xhr.getResponseHeader("HX-Retarget")) $("#ask").replaceChildren();
});
document.addEventListener("close", (event) => { if (event.target.closest("#ask")) event.target.remove(); }, true);

// --- copying ---
function revealButtons() {
  for (const node of document.querySelectorAll("[data-copy][hidden], [data-keys][hidden]")) node.hidden = false;
}
revealButtons();
document.addEventListener("htmx:afterSettle", revealButtons);
document.addEventListener("htmx:wsAfterMessage", () => { revealButtons(); refreshTimes(); });
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) {
    await navigator.clipboard.writeText(button.dataset.copy);
    announce("Copied.");
    const label = button.firstChild.textContent;
    button.firstChild.textContent = "Copied";
    setTimeout(() => { button.firstChild.textContent = label; }, 1500);
  }
  if (event.target.closest("[data-keys]")) $("#keys").showModal();
});

// --- a region drawn anew by the socket keeps the focus and what was unfolded in it ---
let held = { focus: "", open: [] };
document.addEventListener("htmx:wsBeforeMessage", () => {
  held = { focus: document.activeElement?.id, open: [...document.querySelectorAll("details[id][open]")].map((d) => d.id) };
});
document.addEventListener("htmx:wsAfterMessage", () => {
  for (const id of held.open) document.getElementById(id)?.setAttribute("open", "");
  if (held.focus && document.activeElement === document.body)
    document.getElementById(held.focus)?.focus({ preventScroll: true });
});

// --- keys ---
const PLACES = { r: "/", m: "/models/", p: "/profiles/", d: "/deployments/", j: "/jobs/", v: "/verify/", t: "/telemetry/" };
let goPressedAt = 0;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (event.target.closest("input, select, textarea, [contenteditable]")) return;
  if (event.key === "/") {
    const field = $("input[type=search], [data-search], .filters :is(input:not([type=hidden]), select)", $("main"));
    if (field) { event.preventDefault(); field.focus(); field.select?.(); }
  } else if (event.key === "?") {
    event.preventDefault();
    $("#keys").showModal();
  } else if (event.key === "g") {
    goPressedAt = event.timeStamp;
  } else if (PLACES[event.key] && event.timeStamp - goPressedAt < 1000 && $(".side")) {
    location.assign(PLACES[event.key]);
  }
});

// --- htmx: a request that found nobody ends in a sentence, never in silence ---
function problem(text) {
  const strip = document.createElement("div");
  strip.className = "strip bad";
  strip.textContent = text;
  $("#problems").replaceChildren(strip);
  announce(text);
}
document.addEventListener("htmx:sendError", () =>
  problem("The panel did not answer. It may be restarting; what serves goes on. Try again in a moment."));
document.addEventListener("htmx:beforeRequest", () => $("#problems").replaceChildren());
document.addEventListener("htmx:wsClose", (event) => {
  if (event.detail.event?.code === 4401) problem("You have been signed out. Sign in again to go on.");
});
