// A WebSocket that comes back: full-jitter backoff, closed while the page is hidden.
const SIGNED_OUT = 4401;

export function connect(path, { onMessage, onState = () => {} }) {
  let socket = null;
  let tries = 0;
  let timer = 0;
  let ended = false;

  function open() {
    clearTimeout(timer);
    if (ended || socket || document.hidden) return;
    const mine = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`);
    socket = mine;
    mine.onopen = () => { tries = 0; onState("open"); };
    mine.onmessage = (event) => onMessage(JSON.parse(event.data));
    mine.onclose = (event) => {
      if (socket !== mine) return;
      socket = null;
      if (event.code === SIGNED_OUT) { ended = true; onState("signed out"); return; }
      onState("closed");
      timer = setTimeout(open, Math.random() * Math.min(30000, 500 * 2 ** tries++) + 200);
    };
  }

  function close() {
    clearTimeout(timer);
    const old = socket;
    socket = null;
    old?.close();
  }

  document.addEventListener("visibilitychange", () => document.hidden ? close() : open());
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}
