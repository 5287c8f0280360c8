// What goes with every request: the fields of the settings panel, kept in the browser. Empty: the server's default.
import { byId } from "./dom.js";
import { keepSetting, setting } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = ["system", "thinking", "reasoning_effort", "tools"];

export function openSettings() {
  const kept = setting("request", {});
  for (const name of [...NUMBERS, ...TEXTS]) {
    const field = byId(`set-${name}`);
    field.value = kept[name] ?? "";
    field.addEventListener("input", () => {
      keepSetting("request", Object.fromEntries([...NUMBERS, ...TEXTS].map((n) => [n, byId(`set-${n}`).value])));
      valid(false);
    });
  }
}

const value = (name) => byId(`set-${name}`).value.trim();

function tools() {
  if (!value("tools")) return undefined;
  const list = JSON.parse(value("tools"));
  if (!Array.isArray(list)) throw new Error("a list is wanted: [{…}]");
  return list;
}

/** Whether a request can be made of them; if not, what is wrong is shown, and with `reveal` the field gets the focus. */
export function valid(reveal = true) {
  const wrong = NUMBERS.map((name) => byId(`set-${name}`)).find((field) => !field.checkValidity());
  let problem = "";
  try {
    tools();
  } catch (error) {
    problem = `Tools: ${error.message}`;
  }
  byId("tools-error").textContent = problem;
  byId("tools-error").hidden = !problem;
  const field = wrong ?? (problem ? byId("set-tools") : null);
  if (field && reveal) {
    byId("settings").open = true;
    field.focus();
    if (wrong) field.reportValidity();
  }
  return !field;
}

export const systemPrompt = () => value("system");

/** Fields of a chat request. */
export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) if (value(name)) fields[name] = Number(value(name));
  if (value("thinking")) fields.thinking = { type: value("thinking") };
  if (value("reasoning_effort") && value("thinking") !== "disabled") fields.reasoning_effort = value("reasoning_effort");
  if (value("tools")) fields.tools = tools();
  return fields;
}
