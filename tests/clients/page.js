// The page of another origin in tests/test_target_clients.py: fal's JavaScript client in a browser.
import { fal, ApiError } from "@fal-ai/client";

const { base, key, poor } = window.given;
const model = "fal-ai/flux/dev";
const input = { prompt: "a cat", image_size: "landscape_4_3" };
fal.config({ credentials: key, proxyUrl: `${base}/api/fal/proxy`, suppressLocalCredentialsWarning: true });
const told = {};
try {
  told.run = await fal.run(model, { input });
  const updates = [];
  told.polling = await fal.subscribe(model, { input, pollInterval: 50, onQueueUpdate: (u) => updates.push(u.status) });
  told.updates = [...new Set(updates)];
  told.streaming = await fal.subscribe(model, { input, mode: "streaming" });
  const stream = await fal.stream(model, { input });
  told.events = [];
  for await (const event of stream) told.events.push(event.images[0].url);
  told.streamed = await stream.done();
  told.upload = await fal.storage.upload(new File(["a small file"], "small.png", { type: "image/png" }));
  told.uploaded = await (await fetch(told.upload)).text();
  told.blob = await fal.run("fal-ai/clarity-upscaler", { input: { image_url: new Blob(["x"], { type: "image/png" }) } });
  const { request_id: requestId } = await fal.queue.submit(model, { input });
  const cancelled = await fal.queue.cancel(model, { requestId }).catch((error) => error);
  told.cancel = cancelled instanceof ApiError ? cancelled.status : "accepted";
  const direct = await fetch(`${base}/v1/account`, { headers: { "x-api-key": key } });
  told.account = await direct.json();
  fal.config({ credentials: poor, proxyUrl: `${base}/api/fal/proxy`, suppressLocalCredentialsWarning: true });
  told.poor = await fal.run(model, { input }).catch((error) => ({ status: error.status, message: error.message }));
} catch (error) {
  told.failed = `${error.name}: ${error.message}`;
}
window.told = told;
