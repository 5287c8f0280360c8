// How a message looks: one view for each role, with update() for one that grows.
import { button, copyButton, h } from "./dom.js";
import { number, seconds, short } from "./format.js";
import { MarkdownView, codeBlock } from "./markdown.js";

const frame = (role, name, ...children) => h("article", { class: `message ${role}`, "aria-label": name }, ...children);

/** Of the user: text as it was typed. `actions.edit(text)` sends it again in other words. */
export function userView(message, actions) {
  const text = h("div", { class: "text" }, message.content);
  const edit = button("Edit", () => {
    const area = h("textarea", { "aria-label": "Edit the message", rows: Math.min(12, message.content.split("\n").length + 1) });
    area.value = message.content;
    const send = () => area.value.trim() && actions.edit(area.value.trim());
    const back = () => {
      root.replaceChildren(text, tools);
      edit.focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
      if (event.key === "Escape") event.stopPropagation(), back();
    });
    root.replaceChildren(area, h("div", { class: "tools" }, button("Send again", send, { class: "primary" }), button("Cancel", back)));
    area.focus();
  });
  const tools = h("div", { class: "tools" }, edit, copyButton(() => message.content));
  const root = frame("user", "You", text, tools);
  return { root, update() {} };
}

export function toolView(message) {
  return { root: frame("tool", "Tool result", h("div", { class: "label" }, "Tool result"), codeBlock(message.content)), update() {} };
}

const pretty = (json) => {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;  // not complete yet, or never
  }
};

function statsLine(message) {
  const s = message.stats;
  if (!s) return "";
  const parts = [];
  if (message.finish === "stopped") parts.push("stopped");
  if (message.finish === "length") parts.push("cut at its most tokens");
  if (s.tokens != null) parts.push(`${number(s.tokens)} tokens${s.reasoning ? ` (${number(s.reasoning)} of thinking)` : ""}`);
  if (s.rate) parts.push(`${short(s.rate)} t/s`);
  if (s.ttft != null) parts.push(`first token after ${seconds(s.ttft)}`);
  if (s.prompt != null) parts.push(`${number(s.cached)} of ${number(s.prompt)} prompt tokens cached`);
  return parts.join(" · ");
}

const readText = (read) => (read ? `: ${number(read.processed)} of ${number(read.total)} tokens` : "");

/** Of the model: thinking folded, markdown, tool calls, and what it took. */
export function assistantView(message, actions) {
  const thought = h("div", { class: "markdown" });
  const summary = h("summary");
  const thinking = h("details", { class: "thinking", hidden: true }, summary, thought);
  const text = h("div", { class: "text markdown" });
  const calls = h("div", { class: "calls" });
  const waited = h("span"), read = h("progress", { "aria-label": "How much of the prompt is read", hidden: true });
  const waiting = h("p", { class: "waiting", hidden: true }, waited, read);
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const stats = h("p", { class: "stats" });
  const tools = h("div", { class: "tools" }, copyButton(() => message.content), button("Retry", actions.retry));
  const root = frame("assistant", "Answer", thinking, text, calls, waiting, error, stats, tools);
  const views = { thought: new MarkdownView(thought), text: new MarkdownView(text) };
  let shownCalls = "";
  const showThought = () => thinking.open && views.thought.update(message.reasoning);  // of many pages that nobody reads
  thinking.addEventListener("toggle", showThought);

  const showCalls = () => {
    const now = JSON.stringify(message.calls);
    if (now === shownCalls) return;
    shownCalls = now;
    calls.replaceChildren(...message.calls.map((call) =>
      h("div", { class: "call" }, h("div", { class: "label" }, "Calls ", h("b", {}, call.name)), codeBlock(pretty(call.arguments), "arguments"))));
  };
  /** `running`: seconds since it was asked for, or null. */
  const update = (running) => {
    const silent = !message.content && !message.calls.length;
    thinking.hidden = !message.reasoning;
    summary.textContent = running != null && silent ? "Thinking…" : "Thinking";
    showThought();
    views.text.update(message.content);
    showCalls();
    waiting.hidden = running == null || !silent || Boolean(message.reasoning);
    waited.textContent = `Reading the prompt${readText(message.read)}${running >= 1 ? `, ${Math.floor(running)} s` : ""}…`;
    read.hidden = !message.read;
    if (message.read) (read.max = message.read.total), (read.value = message.read.processed);
    error.hidden = !message.error;
    error.textContent = message.error;
    stats.textContent = running == null ? statsLine(message) : "";
    tools.hidden = running != null;
    root.setAttribute("aria-busy", String(running != null));
  };
  return { root, update };
}
