// Run by tests/test_target_clients.py: fal.stream of fal's JavaScript client through its proxyUrl.
import { createFalClient } from "@fal-ai/client";

const proxyUrl = { url: `${process.env.BASE_URL}/api/fal/proxy`, when: "always" };
const fal = createFalClient({ credentials: process.env.KEY, proxyUrl });
const stream = await fal.stream("fal-ai/flux/dev", { input: { prompt: "a cat" } });
const events = [];
for await (const event of stream) events.push(event);
process.stdout.write(JSON.stringify({ events, last: await stream.done(), requestId: stream.requestId }));
