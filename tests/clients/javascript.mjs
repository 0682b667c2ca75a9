// Run by tests/test_queue_clients.py with fal's own JavaScript client, which knows of the proxy by its configuration only.
import { createFalClient, ApiError, ValidationError } from "@fal-ai/client";

const base = process.env.BASE_URL;
const fal = createFalClient({
  credentials: process.env.KEY,
  requestMiddleware: async (request) => ({
    ...request,
    url: request.url.replace("https://queue.fal.run/", `${base}/queue/`).replace("https://fal.run/", `${base}/`),
  }),
});
const model = "fal-ai/flux/dev";
const input = { prompt: "a cat", image_size: "landscape_4_3" };
const told = {};

told.run = await fal.run(model, { input });

const updates = [];
told.polling = await fal.subscribe(model, { input, logs: true, pollInterval: 50, onQueueUpdate: (u) => updates.push(u.status) });
told.pollingUpdates = [...new Set(updates)];
const streamed = [];
told.streaming = await fal.subscribe(model, { input, mode: "streaming", logs: true, onQueueUpdate: (u) => streamed.push(u) });
told.streamingUpdates = [...new Set(streamed.map((update) => update.status))];
told.streamingUrls = streamed.map((update) => update.status_url);

const submitted = await fal.queue.submit(model, { input });
const requestId = submitted.request_id;
let status = await fal.queue.status(model, { requestId, logs: true });
while (status.status !== "COMPLETED") status = await fal.queue.status(model, { requestId, logs: true });
told.queue = { submitted, status, result: await fal.queue.result(model, { requestId }) };

const waiting = await fal.queue.submit(model, { input, headers: { "x-fal-sandbox": "queue_until=never-for-javascript" } });
await fal.queue.cancel(model, { requestId: waiting.request_id });
let ended = await fal.queue.status(model, { requestId: waiting.request_id });
while (ended.status !== "COMPLETED") ended = await fal.queue.status(model, { requestId: waiting.request_id });
told.cancelled = ended.error_type;

const failure = async (call) => {
  try {
    await call();
    return null;
  } catch (error) {
    const kind = error instanceof ValidationError ? "ValidationError" : error instanceof ApiError ? "ApiError" : "other";
    return { kind, status: error.status, message: error.message, body: error.body };
  }
};
told.errors = {
  invalid: await failure(() => fal.subscribe(model, { input: { image_size: "square" } })),
  unpriced: await failure(() => fal.queue.submit("fal-ai/no-such-model", { input })),
  unknownJob: await failure(() => fal.queue.status(model, { requestId: "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72" })),
};
process.stdout.write(JSON.stringify(told));
