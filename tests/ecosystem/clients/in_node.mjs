// Ask a server by the clients that JavaScript programs use; print a JSON line for each request.
//
// Run where these clients are installed and nothing of ours: `node in_node.mjs URL MODEL`. Each
// request has an `x-request-id` of its own, by which the test finds its bill.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// Packages are looked up where the command runs, not beside this file.
const here = createRequire(pathToFileURL(`${process.cwd()}/package.json`));
const load = async (name) => await import(pathToFileURL(here.resolve(name)));

const [url, model] = process.argv.slice(2);
const KEY = "key-of-alpha";
const MESSAGES = [{ role: "user", content: "Name a river." }];
const MAX_TOKENS = 8;
// A random model ends its arguments if it may not repeat itself.
const TOOL_TOKENS = 128;
const PENALTY = 2;
const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const TOOL = {
  type: "function",
  function: { name: "weather", parameters: PARAMETERS, strict: true },
};
const CHOICE = { type: "function", function: { name: "weather" } };
const USAGE = { stream_options: { include_usage: true } };

const said = (text, prompt_tokens, output_tokens, cost) => ({
  text,
  prompt_tokens: prompt_tokens ?? null,
  output_tokens: output_tokens ?? null,
  cost: cost ?? null,
});

async function* openaiClient() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 });
  const same = { model, messages: MESSAGES, max_tokens: MAX_TOKENS };
  const tools = {
    tools: [TOOL],
    tool_choice: CHOICE,
    max_tokens: TOOL_TOKENS,
    frequency_penalty: PENALTY,
  };
  const understood = (text, usage, cost) =>
    said(text, usage?.prompt_tokens, usage?.completion_tokens, cost ?? usage?.cost);

  const complete = async (id, more) => {
    const asked = client.chat.completions.create(
      { ...same, ...more },
      { headers: { "x-request-id": id } },
    );
    const { data, response } = await asked.withResponse();
    const told = response.headers.get("x-cost-meter-cost-usd");
    const texts = data.choices.flatMap(({ message }) =>
      message.tool_calls?.length
        ? message.tool_calls.map((call) => call.function.arguments)
        : [message.content ?? ""],
    );
    return understood(texts.join(""), data.usage, told === null ? null : Number(told));
  };
  const streamed = async (id, more) => {
    const stream = await client.chat.completions.create(
      { ...same, ...more, stream: true },
      { headers: { "x-request-id": id } },
    );
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      usage = chunk.usage ?? usage;
      for (const { delta } of chunk.choices) {
        text += delta.content ?? "";
        for (const call of delta.tool_calls ?? []) text += call.function?.arguments ?? "";
      }
    }
    return understood(text, usage);
  };

  yield ["complete", (id) => complete(id, {})];
  yield ["streamed", (id) => streamed(id, {})];
  yield ["streamed, with usage", (id) => streamed(id, USAGE)];
  yield ["n=2", (id) => complete(id, { n: 2 })];
  yield ["n=2, streamed, with usage", (id) => streamed(id, { n: 2, ...USAGE })];
  yield ["tool call", (id) => complete(id, tools)];
  yield ["tool call, streamed, with usage", (id) => streamed(id, { ...tools, ...USAGE })];
}

// The two providers of the AI SDK: what they understand is asked for in the same way.
async function* aiSdk(provider, toolChoice, costOf) {
  const { generateText, streamText, tool, jsonSchema } = await load("ai");
  const asked = (id, more) => ({
    model: provider,
    prompt: "Name a river.",
    maxOutputTokens: MAX_TOKENS,
    maxRetries: 0,
    headers: { "x-request-id": id },
    ...more,
  });
  const weather = {
    tools: { weather: tool({ inputSchema: jsonSchema(PARAMETERS), strict: true }) },
    toolChoice,
    maxOutputTokens: TOOL_TOKENS,
    frequencyPenalty: PENALTY,
  };
  const understood = (text, calls, usage, cost) =>
    said(
      calls.length ? calls.map((call) => JSON.stringify(call.input)).join("") : text,
      usage.inputTokens,
      usage.outputTokens,
      cost,
    );
  const complete = async (id, more) => {
    const reply = await generateText(asked(id, more));
    const told = reply.response.headers["x-cost-meter-cost-usd"];
    const cost = told === undefined ? null : Number(told);
    return understood(reply.text, reply.toolCalls, reply.usage, cost);
  };
  const streamed = async (id, more) => {
    const failures = [];
    const stream = streamText(asked(id, { ...more, onError: ({ error }) => failures.push(error) }));
    let text = "";
    for await (const part of stream.textStream) text += part;
    if (failures.length) throw failures[0];
    const [calls, usage, about] = await Promise.all([
      stream.toolCalls,
      stream.usage,
      stream.providerMetadata,
    ]);
    return understood(text, calls, usage, costOf(usage, about));
  };

  yield ["complete", (id) => complete(id, {})];
  yield ["streamed, with usage", (id) => streamed(id, {})];
  yield ["tool call", (id) => complete(id, weather)];
  yield ["tool call, streamed, with usage", (id) => streamed(id, weather)];
}

async function* openaiCompatible() {
  const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
  const of = createOpenAICompatible({
    name: "vllm",
    baseURL: `${url}/v1`,
    apiKey: KEY,
    includeUsage: true,
  });
  const toolChoice = { type: "tool", toolName: "weather" };
  yield* aiSdk(of(model), toolChoice, (usage) => usage.raw?.cost);
}

async function* openrouter() {
  const { createOpenRouter } = await load("@openrouter/ai-sdk-provider");
  const of = createOpenRouter({ baseURL: `${url}/v1`, apiKey: KEY, compatibility: "strict" });
  // It does not pass on that a tool is strict, and a random model then calls none as it should.
  yield* aiSdk(of.chat(model), "auto", (_, about) => about?.openrouter?.usage?.cost);
}

const CLIENTS = {
  "openai-node": openaiClient,
  "ai-sdk openai-compatible": openaiCompatible,
  "ai-sdk openrouter": openrouter,
};

for (const [name, ways] of Object.entries(CLIENTS)) {
  for await (const [way, ask] of ways()) {
    const id = `${name}: ${way}`;
    try {
      console.log(JSON.stringify({ id, ...(await ask(id)) }));
    } catch (error) {
      console.log(JSON.stringify({ id, error: String(error?.stack ?? error).slice(0, 2000) }));
    }
  }
}
