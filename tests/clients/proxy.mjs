// Run by tests/test_target_clients.py with fal's own JavaScript client, which knows of the proxy by its proxyUrl only.
import { createFalClient } from "@fal-ai/client";

const proxyUrl = { url: `${process.env.BASE_URL}/api/fal/proxy`, when: "always" };
const fal = createFalClient({ credentials: process.env.KEY, proxyUrl });
const model = "fal-ai/flux/dev";
const input = { prompt: "a cat", image_size: "landscape_4_3" };
const told = {};

told.run = await fal.run(model, { input });
told.get = await fal.run(model, { input: { prompt: "a cat", image_size: "landscape_4_3" }, method: "get" });

const updates = [];
told.polling = await fal.subscribe(model, { input, logs: true, pollInterval: 50, onQueueUpdate: (u) => updates.push(u.status) });
told.pollingUpdates = [...new Set(updates)];
const streamed = [];
told.streaming = await fal.subscribe(model, { input, mode: "streaming", logs: true, onQueueUpdate: (u) => streamed.push(u.status) });
told.streamingUpdates = [...new Set(streamed)];

const submitted = await fal.queue.submit(model, { input, priority: "low" });
const requestId = submitted.request_id;
let status = await fal.queue.status(model, { requestId, logs: true });
while (status.status !== "COMPLETED") status = await fal.queue.status(model, { requestId, logs: true });
told.queue = { submitted, status, result: await fal.queue.result(model, { requestId }) };
const events = [];
for await (const event of await fal.queue.streamStatus(model, { requestId, logs: true })) events.push(event.status);
told.streamStatus = events;

const waiting = await fal.queue.submit(model, { input, headers: { "x-fal-sandbox": "queue_until=never-for-a-proxy-url" } });
// A server in between that passes no such header on lets the job run, and it may be faster than its end.
await fal.queue.cancel(model, { requestId: waiting.request_id }).catch((error) => {
  if (error.body?.status !== "ALREADY_COMPLETED") throw error;
});
let ended = await fal.queue.status(model, { requestId: waiting.request_id });
while (ended.status !== "COMPLETED") ended = await fal.queue.status(model, { requestId: waiting.request_id });
told.cancelled = ended.error_type;

const small = new Blob(["a small file"], { type: "text/plain" });
told.upload = await fal.storage.upload(small, { lifecycle: { expiresIn: "1h" } });
told.uploaded = await (await fetch(told.upload)).text();
// Above 90 MiB the client sends parts of 10 MiB; a blob of one piece repeated costs the memory of the pieces only once.
const piece = new Uint8Array(1024 * 1024).fill(97);
const large = new File(Array(91).fill(piece), "large.bin", { type: "application/octet-stream" });
const largeUrl = await fal.storage.upload(large);
const served = await fetch(largeUrl, { method: "HEAD" });
told.large = { url: largeUrl, length: Number(served.headers.get("content-length")), wanted: large.size };
told.blob = await fal.run("fal-ai/clarity-upscaler", { input: { image_url: new Blob(["picture"], { type: "image/png" }) } });

process.stdout.write(JSON.stringify(told));
