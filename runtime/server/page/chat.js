// The conversation on screen, and the answers that run: one for each conversation, which goes on while another is shown.
import { emptyAnswer, answer } from "./answer.js";
import { byId, say, throttle } from "./dom.js";
import { health, lookNow } from "./health.js";
import { assistantView, toolView, userView } from "./message.js";
import { valid } from "./settings.js";
import { keep } from "./store.js";

const SAVE_MS = 3000, DRAW_MS = 60;

export class Chat {
  /** `changed(conversation)`: it has a new title or time; `model()`: the name to ask for. */
  constructor({ changed, model }) {
    this.changed = changed;
    this.model = model;
    this.views = new Map();
    this.running = new Map();  // conversation id -> { message, controller, began }
    this.removed = new Set();
    this.draw = throttle(() => this.drawRunning(), DRAW_MS);
    this.prompt = byId("prompt");
    this.log = byId("messages");
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    byId("stop").addEventListener("click", () => this.stop());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("input", () => this.fitPrompt());
    document.addEventListener("keydown", (event) => event.key === "Escape" && !byId("key").open && this.stop());
    setInterval(() => this.running.size && this.draw(), 1000);  // how long one waits
  }

  show(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.log.replaceChildren();
    for (const message of conversation.messages) this.addView(message);
    this.log.classList.toggle("empty", !conversation.messages.length);
    this.showControls();
    this.toEnd();
  }

  addView(message) {
    const actions = {
      edit: (text) => this.resend(message, text),
      retry: () => this.retry(message),
    };
    const view = { user: userView, tool: toolView, assistant: assistantView }[message.role](message, actions);
    this.views.set(message, view);
    this.log.classList.remove("empty");
    this.log.append(view.root);
    view.update(this.secondsOf(message));
  }

  secondsOf(message) {
    const run = [...this.running.values()].find((r) => r.message === message);
    return run ? (performance.now() - run.began) / 1000 : null;
  }

  /** Calls of the last answer that have no result yet: what is typed next is the result of the first. */
  openCall() {
    const { messages } = this.conversation;
    const at = messages.findLastIndex((m) => m.role === "assistant");
    if (at < 0 || messages.slice(at + 1).some((m) => m.role === "user")) return null;
    return messages[at].calls[messages.length - at - 1] ?? null;
  }

  send() {
    const text = this.prompt.value.trim();
    if (!text || this.running.has(this.conversation.id) || !this.ready()) return;
    const call = this.openCall();
    this.prompt.value = "";
    this.fitPrompt();
    this.push(call ? { role: "tool", content: text, tool_call_id: call.id } : { role: "user", content: text });
    if (this.openCall()) this.showControls();  // the next result
    else this.ask();
  }

  push(message) {
    const c = this.conversation;
    if (!c.title && message.role === "user") c.title = message.content.slice(0, 60).split("\n")[0];
    c.messages.push(message);
    this.addView(message);
    this.save(c);
  }

  remove(id) {
    this.stop(id);
    this.removed.add(id);
  }

  save(conversation) {
    if (this.removed.has(conversation.id)) return null;
    conversation.changed = Date.now();
    this.changed(conversation);
    return keep(conversation);
  }

  /** Whether a request can go out; where not, the reader is told why. */
  ready() {
    if (!valid()) return false;
    if (health().name !== "loading" && health().name !== "draining") return true;
    say(byId("banner-text").textContent);
    return false;
  }

  cut(message) {
    this.stop();
    const { messages } = this.conversation;
    for (const gone of messages.splice(messages.indexOf(message))) {
      this.views.get(gone)?.root.remove();
      this.views.delete(gone);
    }
  }

  resend(message, text) {
    if (!this.ready()) return;
    this.cut(message);
    this.push({ role: "user", content: text });
    this.ask();
    this.prompt.focus();
  }

  retry(message) {
    if (!this.ready()) return;
    this.cut(message);
    this.ask();
    this.prompt.focus();
  }

  async ask() {
    const conversation = this.conversation;
    const before = [...conversation.messages];
    const message = emptyAnswer();
    const run = { message, controller: new AbortController(), began: performance.now() };
    conversation.messages.push(message);
    this.running.set(conversation.id, run);
    this.addView(message);
    this.showControls();
    this.toEnd();
    const save = throttle(() => this.running.get(conversation.id) === run && keep(conversation), SAVE_MS);
    await answer(this.model(), before, message, run.controller.signal, () => (this.draw(), save()));
    if (this.running.get(conversation.id) === run) this.running.delete(conversation.id);
    if (!conversation.messages.includes(message)) return null;  // cut away meanwhile
    const follow = this.atEnd();
    this.views.get(message)?.update(null);
    if (message.error) lookNow();
    if (this.conversation !== conversation) return this.save(conversation);
    this.showControls();
    if (follow) this.toEnd();
    say(message.error || `Answer: ${message.content}`);
    return this.save(conversation);
  }

  stop(id = this.conversation.id) {
    const run = this.running.get(id);
    if (!run) return;
    run.controller.abort();
    this.running.delete(id);
    this.showControls();
  }

  drawRunning() {
    const run = this.running.get(this.conversation.id);
    const follow = this.atEnd();
    if (run) this.views.get(run.message)?.update(this.secondsOf(run.message));
    if (follow) this.toEnd();
  }

  showControls() {
    const running = this.running.has(this.conversation.id);
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (hadFocus) (running ? byId("stop") : this.prompt).focus();
    const call = running ? null : this.openCall();
    byId("prompt-label").textContent = call ? `Result of ${call.name}` : "Message";
    this.prompt.placeholder = call ? `Result of ${call.name}` : "Ask something";
  }

  fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight + 2, innerHeight / 3)}px`;
  }

  atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }
  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}
