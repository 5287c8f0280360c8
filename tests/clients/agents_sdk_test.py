"""openai-agents: its agent calls a function of ours and reads what it returns, over both of its model classes."""
import asyncio
import os

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"  # before the import: traces go to its maker

import agents
import openai
import pytest

QUESTION = "What is the weather in Oslo?"


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("model_class", [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel])
def test_an_agent_calls_its_tool(server, model_class, streamed):
    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Weather of a city"""
        asked.append(city)
        return "sunny"

    async def converse():
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=120)
        agent = agents.Agent(name="Weather", instructions="Be brief.", tools=[get_weather], model=model_class(model="demo", openai_client=client), model_settings=agents.ModelSettings(temperature=0, include_usage=True))
        if not streamed:
            return await agents.Runner.run(agent, QUESTION, max_turns=4)
        result = agents.Runner.run_streamed(agent, QUESTION, max_turns=4)
        async for _ in result.stream_events():
            pass
        return result

    result = asyncio.run(converse())
    assert len(asked) == 1 and asked[0], "the tool was called"
    assert [type(item).__name__ for item in result.new_items] == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert result.final_output and result.new_items[1].output == "sunny"
    usage = result.context_wrapper.usage
    assert usage.requests == 2 and usage.input_tokens > 100 and usage.output_tokens > 10
