// Run by tests/test_target_clients.py: what fal's JavaScript client makes of refusals through its proxyUrl.
import { createFalClient, ApiError, ValidationError } from "@fal-ai/client";

const proxyUrl = { url: `${process.env.BASE_URL}/api/fal/proxy`, when: "always" };
const client = (credentials, more) => createFalClient({ credentials, proxyUrl, ...more });
const fal = client(process.env.KEY);
const model = "fal-ai/flux/dev";
const input = { prompt: "a cat", image_size: "landscape_4_3" };
const small = new Blob(["a small file"], { type: "text/plain" });
const told = {};

const failure = async (call) => {
  try {
    await call();
    return null;
  } catch (error) {
    const kind = error instanceof ValidationError ? "ValidationError" : error instanceof ApiError ? "ApiError" : "other";
    const fields = kind === "ValidationError" ? error.fieldErrors : undefined;
    return { kind, status: error.status, message: error.message, body: error.body, fields };
  }
};
const poor = client(process.env.POOR_KEY);
told.errors = {
  invalid: await failure(() => fal.run(model, { input: { image_size: "landscape_4_3", num_images: 0 } })),
  invalidJob: await failure(() => fal.subscribe(model, { input: { image_size: "square" } })),
  unpriced: await failure(() => fal.run("fal-ai/no-such-model", { input })),
  unpricedJob: await failure(() => fal.queue.submit("fal-ai/no-such-model", { input })),
  unknownJob: await failure(() => fal.queue.status(model, { requestId: "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72" })),
  poor: await failure(() => poor.run(model, { input })),
  poorJob: await failure(() => poor.subscribe(model, { input })),
  poorUpload: await failure(() => poor.storage.upload(small)),
  wrongKey: await failure(() => client("sk-fal-wrong").run(model, { input })),
};
// What a realtime connection asks for first is a token of the operator's. There is none to be had here.
told.realtime = await new Promise((resolve) => {
  const watched = async (url, request) => {
    const response = await fetch(url, request);
    resolve({ target: request.headers["x-fal-target-url"], status: response.status });
    return response;
  };
  const unheard = { onResult: () => {}, onError: () => {} };
  client(process.env.KEY, { fetch: watched }).realtime.connect(model, unheard).send(input);
});
process.stdout.write(JSON.stringify(told));
