// Run by tests/test_queue_clients.py: streams of fal's own JavaScript client, at whatever address BASE_URL names.
import { createFalClient, ApiError, ValidationError } from "@fal-ai/client";

const base = process.env.BASE_URL;
let weather = "";
const client = (credentials) =>
  createFalClient({
    credentials,
    requestMiddleware: async (request) => ({
      ...request,
      headers: { ...request.headers, "x-fal-sandbox": weather },
      url: request.url.replace("https://fal.run/", `${base}/`),
    }),
  });
const fal = client(process.env.KEY);
const model = "fal-ai/flux/dev";
const input = { prompt: "a café 🐱", seed: 7 };
const cases = { plain: "", pinged: "pings=1; event_delay_s=0.01", split: "split=1", unended: "unended=1", long: "events=200" };
const told = { errors: {} };

for (const [name, wanted] of Object.entries(cases)) {
  weather = wanted;
  const stream = await fal.stream(model, { input });
  const events = [];
  for await (const event of stream) events.push(event);
  told[name] = { events, done: await stream.done(), requestId: stream.requestId };
}

const failure = async (options, from = fal) => {
  const events = [];
  const stream = await from.stream(options.model ?? model, { input, ...options });
  stream.on("data", (event) => events.push(event));
  try {
    await stream.done();
    return { events: events.length };
  } catch (error) {
    const kind = error instanceof ValidationError ? "ValidationError" : error instanceof ApiError ? "ApiError" : "other";
    return { events: events.length, kind, status: error.status, message: error.message };
  }
};
weather = "";
told.errors.invalid = await failure({ input: { image_size: "square" } });
told.errors.unknown = await failure({ model: "fal-ai/no-such-model" });
told.errors.poor = await failure({}, client(process.env.POOR_KEY));
weather = "cut_after=2";
told.errors.cut = await failure({});
process.stdout.write(JSON.stringify(told));
