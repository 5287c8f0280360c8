// Requests to the box. Its key is asked for once, on the first 401, and lives as long as the tab.
import { byId } from "./dom.js";

const KEY = "thermocline.key";
let asking = null;
let declined = false;
const keyListeners = [];

export class ApiError extends Error {
  constructor(status, message, detail = {}) {
    super(message);
    this.status = status;
    this.detail = detail;
  }
  static async of(reply) {
    const text = await reply.text();
    try {
      const { error } = JSON.parse(text);
      return new ApiError(reply.status, error.message, error);
    } catch {
      return new ApiError(reply.status, `The server answers ${reply.status}`);
    }
  }
}

export const key = () => sessionStorage.getItem(KEY);
export const onKey = (listener) => keyListeners.push(listener);

/**
 * fetch() with the key; an answer that is no success is thrown as ApiError. `background`: nobody waits for it, so it
 * does not ask for a key that was refused once.
 */
export async function request(path, options = {}, background = false) {
  for (;;) {
    const used = key();
    const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
    const reply = await fetch(path, { ...options, headers });
    if (reply.ok) return reply;
    const error = await ApiError.of(reply);
    if (reply.status !== 401 || (background && declined)) throw error;
    if (key() !== used) continue;  // entered while this one was on its way
    if (!(await (asking ??= ask(used !== null).finally(() => (asking = null))))) throw error;
  }
}

export const get = async (path, background = true) => (await request(path, {}, background)).json();

export function post(path, body, signal) {
  return request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

/** The data of an event stream, event by event; comments are signs of life and no events. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => null);
  }
}

// True once there is a key.
function ask(refused) {
  const dialog = byId("key");
  const input = byId("key-input");
  byId("key-text").textContent = refused
    ? "The server does not take this key."
    : "This server wants a key. It is kept until this tab is closed.";
  input.value = "";
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      declined = false;
      dialog.close("entered");
      for (const listener of keyListeners) listener();
    };
    byId("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      if (dialog.returnValue !== "entered") declined = true;
      resolve(dialog.returnValue === "entered");
    };
    dialog.returnValue = "";
    dialog.showModal();
    input.focus();
  });
}
