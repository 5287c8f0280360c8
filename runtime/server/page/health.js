// Whether the box answers: /health, every few seconds while it does, ever more seldom while it does not.
import { byId, say } from "./dom.js";

const EVERY = { ready: 5, loading: 1, draining: 2, failed: 5 };
const LONGEST_WAIT = 15;

let state = { name: "asking" };
let wake = () => {};
const listeners = [];

export const health = () => state;
export const onHealth = (listener) => listeners.push(listener);
/** Something failed: look at once. */
export const lookNow = () => wake();

// A 503 of something in front of the box has no such body, and is a failure with the status as its reason.
function stateOf(status, body) {
  if (status === 200) return { name: "ready", counts: body ?? {} };
  const error = body?.error ?? {};
  if (error.progress != null) return { name: "loading", progress: error.progress };
  const name = /stopping|draining/i.test(error.message ?? "") ? "draining" : "failed";
  return { name, message: error.message ?? `/health answers ${status}` };
}

async function look() {
  try {
    const reply = await fetch("health", { signal: AbortSignal.timeout(10000) });
    return stateOf(reply.status, await reply.json().catch(() => null));
  } catch {
    return { name: "lost" };
  }
}

function show() {
  const { name, progress, message } = state;
  const chip = byId("state");
  chip.dataset.state = name;
  chip.textContent = name;
  const texts = {
    loading: `Loading the model: ${Math.floor(100 * progress)} %`,
    draining: "The server is stopping: running answers end, new ones are refused.",
    failed: `The server does not serve: ${message}`,
    lost: "The server does not answer.",
  };
  byId("banner").hidden = !texts[name];
  byId("banner").dataset.state = name;
  if (texts[name]) byId("banner-text").textContent = texts[name];
  byId("banner-progress").hidden = name !== "loading";
  if (name === "loading") byId("banner-progress").value = progress;
  byId("banner-retry").hidden = name !== "lost";
}

// Waits, counting down where somebody may not want to.
async function pause(seconds) {
  let woken = false;
  for (let left = seconds; left > 0 && !woken; --left) {
    if (state.name === "lost") byId("banner-text").textContent = `The server does not answer. Next try in ${left} s.`;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 1000);
      wake = () => {
        woken = true;
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

export async function watchHealth() {
  byId("banner-retry").addEventListener("click", lookNow);
  document.addEventListener("visibilitychange", () => document.hidden || lookNow());
  for (let wait = 1; ;) {
    const before = state.name;
    state = await look();
    show();
    if (state.name !== before) {
      if (before !== "asking" || state.name !== "ready") say(byId("banner").hidden ? "The server is ready." : byId("banner-text").textContent);
      for (const listener of listeners) listener(state);
    }
    wait = state.name === "lost" ? (before === "lost" ? Math.min(2 * wait, LONGEST_WAIT) : 1) : EVERY[state.name];
    await pause(document.hidden ? Math.max(wait, LONGEST_WAIT) : wait);
  }
}
