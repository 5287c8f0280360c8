"""/v1/responses with the official openai client, and as Codex asks."""
import json
import time

import openai
import pytest

ASK = "What is the capital of Norway?"
OSLO = "The capital of Norway is Oslo."
WEATHER = "What is the weather in Oslo?"
TOOL = {"type": "function", "name": "get_weather", "description": "Weather of a city", "strict": False, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
CUSTOM = {"type": "custom", "name": "lookup", "description": "Looks a word up"}
THINK = {"reasoning": {"effort": "high"}}
# What the model reads on from here has no end.
LONG = [{"role": "user", "content": "Read on."}, {"role": "assistant", "content": "And it came to pass"}]


def create(server, given, **fields):
    return server.client.responses.create(model="demo", input=given, temperature=0, **fields)


def streamed(server, given, **fields):
    """The events, and the response that the client puts together of them (of one that was cut it takes the last event's)."""
    with server.client.responses.stream(model="demo", input=given, temperature=0, **fields) as stream:
        events = list(stream)
        return events, events[-1].response if events[-1].type == "response.incomplete" else stream.get_final_response()


def shape(response):
    """What a response says, without the ids that are new in every answer."""
    items = [item.to_dict() for item in response.output]
    for item in items:
        item.pop("id"), item.pop("call_id", None), item.pop("parsed_arguments", None)
        for part in item.get("content", []):
            part.pop("parsed", None)
    usage = response.usage
    return items, response.status, response.incomplete_details, usage.input_tokens, usage.output_tokens, usage.output_tokens_details.reasoning_tokens


ANSWERS = pytest.mark.parametrize("given, fields, kinds", [
    (ASK, {}, ["message"]),
    (ASK, {"instructions": "Be brief.", "store": False}, ["message"]),
    ("What is 3 + 4?", THINK, ["reasoning", "message"]),
    (WEATHER, {"tools": [TOOL]}, ["function_call"]),
    (WEATHER, {"tools": [TOOL], **THINK}, ["reasoning", "function_call"]),
    (ASK, {"max_output_tokens": 3}, ["message"]),
], ids=["text", "instructions", "thinking", "tool", "thinking_tool", "cut"])


@ANSWERS
def test_plain_and_streamed_agree(server, given, fields, kinds):
    plain = create(server, given, **fields)
    events, final = streamed(server, given, **fields)
    assert shape(plain) == shape(final) and [item.type for item in plain.output] == kinds
    assert plain.status == ("incomplete" if "max_output_tokens" in fields else "completed")
    assert final.usage.input_tokens_details.cached_tokens == final.usage.input_tokens - 1, "the same prompt was just computed"
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens
    assert plain.id.startswith("resp_") and len({plain.id, final.id}) == 2


@ANSWERS
def test_events_come_in_order(server, given, fields, kinds):
    events = list(server.client.responses.create(model="demo", input=given, temperature=0, stream=True, **fields))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == ("response.incomplete" if "max_output_tokens" in fields else "response.completed")
    opened, done, pieces = [], [], {}
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert len(opened) == len(done) == event.output_index
            opened.append(event.item)
            continue
        assert event.output_index == len(opened) - 1, "one item at a time, counted from 0"
        if event.type == "response.output_item.done":
            done.append(event.item)
        else:
            assert event.item_id == opened[-1].id
        if event.type.endswith(".delta"):
            pieces.setdefault(event.output_index, []).append(event.delta)
    assert done == last.response.output, "clients build their history of these items"
    assert [item.id for item in opened] == [item.id for item in done] and [item.type for item in done] == kinds
    for index, item in enumerate(done):
        whole = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(pieces[index]) == whole != ""


def test_what_the_answers_are(server):
    assert create(server, ASK).output_text == OSLO
    assert create(server, [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]).output_text == OSLO
    cut = create(server, ASK, max_output_tokens=3)
    assert cut.incomplete_details.reason == "max_output_tokens" and cut.usage.output_tokens == 3 and OSLO.startswith(cut.output_text)
    chat = server.client.chat.completions.create(model="demo", messages=[{"role": "user", "content": ASK}], temperature=0)
    assert create(server, ASK).usage.input_tokens == chat.usage.prompt_tokens, "the same prompt as the chat's"


def test_a_function_is_called_and_its_result_read(server):
    called = create(server, WEATHER, tools=[TOOL], **THINK)
    call = called.output[-1]
    assert call.name == "get_weather" and call.call_id.startswith("call_") and isinstance(json.loads(call.arguments)["city"], str)
    history = [{"role": "user", "content": WEATHER}, *called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    answer = create(server, history, tools=[TOOL], **THINK)
    assert answer.output_text and answer.usage.input_tokens_details.cached_tokens >= called.usage.input_tokens, "reasoning and call are replayed as they were said"
    followed = create(server, history[-1:], previous_response_id=called.id, tools=[TOOL], **THINK)
    assert shape(followed) == shape(answer), "kept here or sent again: the same conversation"


def test_a_custom_tool_takes_text(server):
    given = [{"role": "user", "content": "Look up the word bear."}]
    called = create(server, given, tools=[CUSTOM])
    assert called.output[-1].type == "custom_tool_call", called.output
    call = called.output[-1]
    assert call.name == "lookup" and call.input and call.id.startswith("ctc_")
    events, final = streamed(server, given, tools=[CUSTOM])
    assert shape(final) == shape(called)
    assert "".join(e.delta for e in events if e.type == "response.custom_tool_call_input.delta") == call.input
    answer = create(server, given + [call, {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "an animal"}], tools=[CUSTOM])
    assert answer.status == "completed" and answer.output


def test_a_conversation_is_kept(server):
    first = create(server, ASK, instructions="Be brief.")
    second = create(server, "And what is the capital of Peru?", previous_response_id=first.id)
    sent = create(server, [{"role": "user", "content": ASK}, *first.output, {"role": "user", "content": "And what is the capital of Peru?"}])
    assert shape(second) == shape(sent) and second.previous_response_id == first.id, "the instructions were the first response's alone"
    assert server.client.responses.retrieve(first.id).output == first.output
    server.client.responses.delete(first.id)
    for gone in (lambda: server.client.responses.retrieve(first.id), lambda: server.client.responses.delete(first.id), lambda: server.client.responses.cancel("resp_none")):
        with pytest.raises(openai.NotFoundError):
            gone()
    with pytest.raises(openai.BadRequestError) as refused:
        create(server, "More", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"
    third = create(server, "And of Italy?", previous_response_id=second.id)
    assert third.output_text, "what followed it does not need it"


def test_what_is_not_stored_is_not_there(server):
    response = create(server, ASK, store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(response.id)


def test_one_that_runs_is_cancelled(start_server, tmp_path):
    log = tmp_path / "access.jsonl"
    server = start_server("--access-log", log)
    stream = server.client.responses.create(model="demo", input=LONG, temperature=0, max_output_tokens=3900, stream=True)
    events = iter(stream)
    created = next(events).response
    cancelled = server.client.responses.cancel(created.id)
    assert cancelled.status == "cancelled" and server.client.responses.retrieve(created.id).status == "cancelled"
    assert [e.type for e in events][-1] == "response.failed"
    with server.client.responses.create(model="demo", input=LONG, temperature=0, max_output_tokens=3900, stream=True) as left:
        next(iter(left))
    end = time.time() + 60

    def cancelled_entries():
        return [entry for entry in map(json.loads, log.read_text().splitlines()) if entry.get("finish") == "cancelled"]

    # The log has it when its client is gone, the engine ends it with the step.
    while (len(cancelled_entries()) < 2 or server.request("GET", "/health")[2]["running"]) and time.time() < end:
        time.sleep(0.02)
    entries = cancelled_entries()
    assert len(entries) == 2 and all(entry["completion_tokens"] < 3900 for entry in entries), entries
    assert server.request("GET", "/health")[2]["running"] == 0 and create(server, ASK).output_text == OSLO
    server.stop()


CODEX = {
    "instructions": "You are a coding agent. " + "Patch files with apply_patch, and say what you did. " * 10,
    "tools": [
        {**TOOL, "strict": True}, {"type": "custom", "name": "apply_patch", "description": "Patches files", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
        {"type": "web_search", "external_web_access": True}, {"type": "local_shell"}, {"type": "image_generation", "output_format": "png"}, {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "x"}]},
    ],
    "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": True,
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199-conversation", "service_tier": "priority", "text": {"verbosity": "low"}, "client_metadata": {"x": "y"},
}


def codex(server, items):
    """One request of Codex, read as Codex reads it: history of output_item.done, usage of response.completed."""
    body = {"model": "gpt-5-codex", "input": items, "temperature": 0, "max_output_tokens": 150, **CODEX}
    headers = {"content-type": "application/json", "accept": "text/event-stream", "originator": "codex_cli_rs", "session_id": "s", "conversation_id": "c"}
    status, got, text = server.request("POST", "/v1/responses", body, headers)
    assert status == 200 and got["Content-Type"].startswith("text/event-stream"), text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [line[7:] for line in text.splitlines() if line.startswith("event: ")] == [e["type"] for e in events]
    assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
    usage = events[-1]["response"]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    return [e["item"] for e in events if e["type"] == "response.output_item.done"], usage


def test_codex_goes_on_from_what_was_said(server):
    items = [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "The folder is /home/me/project."}]}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": WEATHER}]}]
    before = None
    for more in ("What is 3 + 4?", "What is the capital of Norway?", None):
        output, usage = codex(server, items)
        assert output, "an answer"
        if before:
            assert usage["input_tokens_details"]["cached_tokens"] >= before["input_tokens"]
        before = usage
        items += output
        items += [{"type": item["type"] + "_output", "call_id": item["call_id"], "output": "sunny"} for item in output if item["type"].endswith("_call")]
        items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": more or "Bye"}]})
    foreign = {"type": "reasoning", "id": "rs_elsewhere", "summary": [], "encrypted_content": "gAAAAA"}
    assert codex(server, items[:2] + [foreign, {"type": "web_search_call", "id": "ws_1", "status": "completed"}] + items[2:])[0], "items of other servers are passed over"


def test_codex_probes_pass(server):
    for given in ([], "", None):
        status, _, reply = server.request("POST", "/v1/responses", {"model": "x", "input": given, "max_output_tokens": 1, "store": False})
        assert status == 200 and reply["usage"]["output_tokens"] == 1, reply


def test_errors_are_typed(server, start_server):
    for given, fields, param in (
        (5, {}, "input"), ([{"role": "robot", "content": "x"}], {}, "input[0].role"), ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], {}, "input[0].content[0]"),
        ([{"type": "function_call_output", "output": "x"}], {}, "input[0].call_id"), (ASK, {"max_output_tokens": 0}, "max_output_tokens"), (ASK, {"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        (ASK, {"tools": [{"type": "function"}]}, "tools[0].name"), (ASK, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice"), (ASK, {"text": {"format": {"type": "json_object"}}}, "text.format"),
        (ASK, {"background": True}, "background"), ("word " * 50_000, {}, None),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                create(server, given, stream=stream, **fields)
            assert param is None or refused.value.param == param, refused.value
            assert param or refused.value.code == "context_length_exceeded"
    keyed = start_server("--api-key", "open-sesame-open")
    with pytest.raises(openai.AuthenticationError) as stranger:
        create(keyed, ASK)
    assert stranger.value.code == "invalid_api_key"
    assert keyed.client.with_options(api_key="open-sesame-open").responses.create(model="demo", input=ASK, temperature=0).output_text == OSLO
    keyed.stop()
