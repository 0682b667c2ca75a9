// Run by tests/test_webhooks.py with fal's own JavaScript client: a job whose end is told to WEBHOOK_URL, and a refusal.
import { createFalClient } from "@fal-ai/client";

const base = process.env.BASE_URL;
const fal = createFalClient({
  credentials: process.env.KEY,
  requestMiddleware: async (request) => ({ ...request, url: request.url.replace("https://queue.fal.run/", `${base}/queue/`) }),
});
const input = { prompt: "a cat", image_size: "landscape_4_3" };
const { request_id } = await fal.queue.submit("fal-ai/flux/dev", { input, webhookUrl: process.env.WEBHOOK_URL });
const refused = await fal.queue
  .submit("fal-ai/flux/dev", { input, webhookUrl: "https://10.0.0.1/hook" })
  .catch((error) => [error.status, error.message]);
process.stdout.write(JSON.stringify({ request_id, refused }));
