// One answer on its way: a chat request as a stream, put together into a message as it comes.
import { ApiError, events, post } from "./api.js";
import { requestFields, systemPrompt } from "./settings.js";

/** Messages as the API takes them. An answer that failed before its first word is none. */
function sent(messages) {
  const system = systemPrompt();
  const list = system ? [{ role: "system", content: system }] : [];
  for (const m of messages) {
    if (m.role !== "assistant") list.push({ role: m.role, content: m.content, tool_call_id: m.tool_call_id });
    else if (m.content || m.calls.length)
      list.push({
        role: "assistant",
        content: m.content,
        reasoning_content: m.reasoning || undefined,
        tool_calls: m.calls.length ? m.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } })) : undefined,
      });
  }
  return list;
}

export const emptyAnswer = () => ({ role: "assistant", content: "", reasoning: "", calls: [], finish: "", stats: null, error: "", read: null });

function add(message, delta) {
  message.reasoning += delta.reasoning_content ?? "";
  message.content += delta.content ?? "";
  for (const piece of delta.tool_calls ?? []) {
    const call = (message.calls[piece.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= piece.id ?? "";
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
}

const saysSomething = (delta) => delta.reasoning_content || delta.content || delta.tool_calls;

/** Fills `message` from what the server answers to `before`; `changed()` after every piece. Never throws. */
export async function answer(model, before, message, signal, changed) {
  const began = performance.now();
  let first = 0, last = 0, usage = null, ended = false;
  try {
    const body = { model: model || undefined, messages: sent(before), stream: true, stream_options: { include_usage: true }, return_progress: true, ...requestFields() };
    for await (const data of events(await post("v1/chat/completions", body, signal))) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message, event.error);
      usage = event.usage ?? usage;
      message.read = event.prompt_progress ?? message.read;
      const choice = event.choices?.[0];
      if (!choice) {
        changed();
        continue;
      }
      if (choice.delta && saysSomething(choice.delta)) {
        last = performance.now();
        first ||= last;
        add(message, choice.delta);
      }
      message.finish = choice.finish_reason ?? message.finish;
      changed();
    }
    if (!ended) throw new TypeError("the stream ended early");
  } catch (error) {
    if (signal.aborted) message.finish = "stopped";
    else message.error = error instanceof ApiError ? error.message : "The connection to the server broke.";
  }
  message.stats = statsOf(usage, began, first, last);
  message.read = null;
}

// Speed is that of the tokens after the first, whose time is the prompt's.
function statsOf(usage, began, first, last) {
  const stats = { ttft: first ? (first - began) / 1000 : null, seconds: (performance.now() - began) / 1000 };
  if (!usage) return stats;
  const tokens = usage.completion_tokens;
  return {
    ...stats,
    tokens,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    rate: tokens > 1 && last > first ? (tokens - 1) / ((last - first) / 1000) : null,
  };
}
