"""Conversations of agents and front ends: every turn computes what is new in it, and says what a server without a cache says."""
import json
import threading

import pytest

from anthropic_client import GREEDY, blocks_of, client_of, prompt_tokens, text_of
from program import Server

TURNS = 30
SYSTEM = "You are a coding agent. " + "Use the tools that you have, and say what you did. " * 6
NAME, ABOUT = "get_weather", "Weather of a city"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CITIES = ["Oslo", "Lima", "Rome", "Paris", "Madrid"]
MOST = 80  # tokens of an answer


def question(turn):
    city = CITIES[turn % len(CITIES)]
    return [f"What is the weather in {city}?", "What is 3 + 4?", "What is the opposite of hot?", f"Run the tests of module {turn}, and tell me a story about a fox."][turn % 4]


class Chat:
    """An agent on /v1/chat/completions: answer() gives (reasoning, text, calls), and what usage says of prompt, cached and answered tokens."""

    def __init__(self, server):
        self.client = server.client
        self.messages = [{"role": "system", "content": SYSTEM}]

    def say(self, text):
        self.messages.append({"role": "user", "content": text})

    def answer(self):
        tools = [{"type": "function", "function": {"name": NAME, "description": ABOUT, "parameters": SCHEMA}}]
        reply = self.client.chat.completions.create(model="demo", messages=self.messages, tools=tools, temperature=0, max_tokens=MOST, extra_body={"thinking": {"type": "enabled"}})
        message = reply.choices[0].message
        self.messages.append(message.model_dump(exclude_none=True))
        calls = message.tool_calls or []
        self.messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
        said = message.model_extra.get("reasoning_content") or "", message.content or "", [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        return said, reply.usage.prompt_tokens, reply.usage.prompt_tokens_details.cached_tokens, reply.usage.completion_tokens


class Messages:
    """The same on /v1/messages."""

    def __init__(self, server):
        self.client = client_of(server)
        self.messages = []

    def say(self, text):
        self.messages.append({"role": "user", "content": text})

    def answer(self):
        tools = [{"name": NAME, "description": ABOUT, "input_schema": SCHEMA}]
        reply = self.client.messages.create(model="demo", system=SYSTEM, messages=self.messages, tools=tools, max_tokens=MOST, thinking={"type": "adaptive"}, extra_body=GREEDY)
        self.messages.append({"role": "assistant", "content": blocks_of(reply)})
        calls = [block for block in reply.content if block.type == "tool_use"]
        if calls:
            self.messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls]})
        said = "".join(b.thinking for b in reply.content if b.type == "thinking"), text_of(reply), [(call.name, call.input) for call in calls]
        return said, prompt_tokens(reply.usage), reply.usage.cache_read_input_tokens, reply.usage.output_tokens


class Responses:
    """The same on /v1/responses, with the whole input in every request as Codex sends it."""

    def __init__(self, server):
        self.client = server.client
        self.items = []

    def say(self, text):
        self.items.append({"role": "user", "content": text})

    def answer(self):
        tools = [{"type": "function", "name": NAME, "description": ABOUT, "strict": False, "parameters": SCHEMA}]
        reply = self.client.responses.create(model="demo", instructions=SYSTEM, input=self.items, tools=tools, temperature=0, max_output_tokens=MOST, reasoning={"effort": "high"}, store=False)
        self.items += reply.output
        calls = [item for item in reply.output if item.type == "function_call"]
        self.items += [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
        said = "".join(i.content[0].text for i in reply.output if i.type == "reasoning"), reply.output_text, [(call.name, json.loads(call.arguments)) for call in calls]
        return said, reply.usage.input_tokens, reply.usage.input_tokens_details.cached_tokens, reply.usage.output_tokens


def converse(agent):
    """[(said, prompt, cached, answered)] of a conversation: after a call its result is the turn, else a question."""
    turns = []
    for turn in range(TURNS):
        if not turns or not turns[-1][0][2]:
            agent.say(question(turn))
        turns.append(agent.answer())
    return turns


@pytest.fixture(scope="module")
def uncached():
    server = Server("--no-prefix-cache")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cold(uncached):
    turns = converse(Chat(uncached))
    assert all(cached == 0 for _, _, cached, _ in turns)
    return turns


@pytest.mark.parametrize("kind", [Chat, Messages, Responses])
def test_a_turn_computes_what_is_new_in_it(start_server, cold, kind):
    server = start_server()
    warm = converse(kind(server))
    assert [(said, prompt) for said, prompt, *_ in warm] == [(said, prompt) for said, prompt, *_ in cold], "whatever the protocol and the cache"
    for (_, before, _, answered), (_, prompt, cached, _) in zip(warm, warm[1:]):
        # A checkpoint is kept at the end of every answer (docs/kv.md). Its last token was sampled and never computed, so
        # no page and no granule: all but that one.
        assert before + answered - 1 <= cached < prompt
    assert warm[-1][1] > 1200, "a prefix that grew"
    assert any(calls for (_, _, calls), *_ in warm) and len({text for (_, text, _), *_ in warm}) > 4
    server.stop()


# What a front end asks beside a chat, about the chat so far.
ASIDE = {
    "title": "### Task:\nName this chat in three to five words, with an emoji in front, in its language.\n### Output:\nJSON: {\"title\": \"...\"}\n### Chat History:\n<chat_history>\n%s\n</chat_history>",
    "tags": "### Task:\nGive one to three broad tags of what this chat is about, and one to three finer ones.\n### Output:\nJSON: {\"tags\": [\"tag1\", \"tag2\"]}\n### Chat History:\n<chat_history>\n%s\n</chat_history>",
    "follow_ups": "### Task:\nSuggest three to five questions that the user may ask next, from the user's side.\n### Output:\nJSON: {\"follow_ups\": [\"...\"]}\n### Chat History:\n<chat_history>\n%s\n</chat_history>",
}


def ask(server, messages, max_tokens=100):
    reply = server.client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=max_tokens)
    return reply.choices[0].message.content, reply.usage


def in_threads(calls):
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_titles_and_tags_do_not_cost_a_chat_its_prefix(uncached, start_server):
    """As Open WebUI does it: while the answer of a long chat streams, and around it, come small requests about it."""
    # As few checkpoints as the cache has room for, so that who may stay is a question.
    server = start_server("--max-num-seqs", "4", "--prefix-cache-memory", "3MiB")
    chat = [{"role": "user", "content": "Here are my notes. " + " ".join(f"In year {year} the fox met {year % 7} bears at the river and told them a story." for year in range(90))}]
    chat += [{"role": "assistant", "content": "Thank you."}, {"role": "user", "content": "What is the capital of Norway?"}]
    ask(server, chat)
    short = "\n".join(f"{m['role'].upper()}: {m['content'][:300]}" for m in chat)
    aside = [[{"role": "user", "content": text % (short + f"\nUSER: {n}")}] for n in range(4) for text in ASIDE.values()]
    long = chat[:-1] + [{"role": "user", "content": "Read on."}, {"role": "assistant", "content": "And it came to pass"}]

    def stream():
        chunks = list(server.client.chat.completions.create(model="demo", messages=long, temperature=0, max_tokens=300, stream=True, stream_options={"include_usage": True}, extra_body={"continue_final_message": True}))
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage

    (told, usage), *answers = in_threads([stream] + [lambda messages=messages: ask(server, messages) for messages in aside])
    assert usage.completion_tokens == 300
    on = long[:-1] + [{"role": "assistant", "content": long[-1]["content"] + told}, {"role": "user", "content": "What is the opposite of hot?"}]
    answer, after = ask(server, on)
    parts = {part["kind"]: part for tier in server.request("GET", "/v1/stats")[2]["tiers"] for part in tier["parts"]}
    assert parts["prefix"]["used_bytes"] > parts["prefix"]["bytes"] * 0.8, "there was no room for all of them"
    assert after.prompt_tokens_details.cached_tokens >= usage.prompt_tokens + usage.completion_tokens - 1
    alone = uncached.client.chat.completions.create(model="demo", messages=long, temperature=0, max_tokens=300, extra_body={"continue_final_message": True})
    assert told == alone.choices[0].message.content
    assert [text for text, _ in answers] == [ask(uncached, messages)[0] for messages in aside]
    assert answer == ask(uncached, on)[0]
    server.stop()
