// Loaded with `node --require` before the proxy: it only accepts fal's hosts, so its fetch is redirected to the local stub.
"use strict";
const FAL = "https://fal.run";
const stub = process.env.BENCH_STUB_URL;
const realFetch = globalThis.fetch;

globalThis.fetch = (url, init) => {
  if (typeof url !== "string" || !url.startsWith(FAL)) throw new Error(`the benchmark never leaves this machine: ${url}`);
  return realFetch(stub + url.slice(FAL.length), init);
};
