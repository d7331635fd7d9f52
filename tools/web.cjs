// ONNX Runtime Web (wasm, one thread) as a consumer of compat.py, in Node itself or in headless Chromium:
// node web.cjs FOLDER node|chromium TASK, where FOLDER holds node_modules. consumers.py says what goes in and out.
"use strict";
const fs = require("fs");
const http = require("http");
const path = require("path");

// Runs in Node and, as text, in the page: feeds one model and returns its outputs as {type, dims, data}.
async function runModel(ort, model, feeds) {
  const ARRAYS = {
    float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
    int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
    int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  };
  const tensor = (t) => {
    const bytes = Uint8Array.from(atob(t.data), (c) => c.charCodeAt(0));
    // A Float16Array, where there is one, is what the tensor asks for; the bits are the same.
    const kind = t.type === "float16" && globalThis.Float16Array ? Float16Array : ARRAYS[t.type];
    return new ort.Tensor(t.type, new kind(bytes.buffer), t.dims);
  };
  const told = (t) => {
    const bytes = new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength);
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return { type: t.type, dims: t.dims, data: btoa(text) };
  };
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  const outputs = [];
  for (const feed of feeds) {
    const given = Object.fromEntries(Object.entries(feed).map(([name, t]) => [name, tensor(t)]));
    const answer = await session.run(given);
    outputs.push(session.outputNames.map((name) => told(answer[name])));
  }
  await session.release();
  return { outputs };
}

const feedsOf = (task) => task.feeds.map((f) => JSON.parse(fs.readFileSync(f, "utf8")));

async function each(tasks, run) {
  const results = [];
  for (const task of tasks) {
    try {
      results.push(await run(task));
    } catch (error) {
      results.push({ error: String(error).slice(0, 300) });
    }
  }
  return results;
}

async function inNode(library, tasks) {
  const ort = library("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  const results = await each(tasks, (t) => runModel(ort, new Uint8Array(fs.readFileSync(t.model)), feedsOf(t)));
  return { version: `${ort.env.versions.web}, Node ${process.versions.node}`, results };
}

// The page fetches the library and the models from here: wasm cannot be had from a file: address.
function serve(folder, tasks) {
  const types = { ".mjs": "text/javascript", ".wasm": "application/wasm" };
  const server = http.createServer((request, answer) => {
    const name = request.url.slice(1);
    if (name === "") return answer.setHeader("Content-Type", "text/html").end("<!doctype html>");
    const asked = /^model\/(\d+)$/.exec(name);
    const file = asked ? tasks[Number(asked[1])].model : path.join(folder, path.basename(name));
    if (!fs.existsSync(file)) return answer.writeHead(404).end();
    answer.setHeader("Content-Type", types[path.extname(file)] || "application/octet-stream");
    fs.createReadStream(file).pipe(answer);
  });
  return new Promise((done) => server.listen(0, "127.0.0.1", () => done(server)));
}

async function inChromium(library, tasks) {
  const told = library("@sparticuz/chromium");
  const chromium = told.default || told;
  const puppeteer = library("puppeteer-core");
  const server = await serve(path.dirname(library.resolve("onnxruntime-web")), tasks);
  const browser = await puppeteer.launch({
    args: [...chromium.args, "--no-sandbox"], executablePath: await chromium.executablePath(), headless: "shell",
  });
  try {
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const web = await page.evaluate(async () => {
      globalThis.ort = await import("/ort.wasm.min.mjs");
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmPaths = "/";
      return ort.env.versions.web;
    });
    await page.evaluate(`globalThis.runModel = ${runModel}`);
    const results = await each(tasks, (task) => page.evaluate(async (i, feeds) => {
      const model = await (await fetch(`/model/${i}`)).arrayBuffer();
      return runModel(ort, new Uint8Array(model), feeds);
    }, tasks.indexOf(task), feedsOf(task)));
    return { version: `${web}, ${await browser.version()}`, results };
  } finally {
    await browser.close();
    server.close();
  }
}

async function main(room, how, task) {
  const library = require("module").createRequire(path.join(room, "package.json"));
  const tasks = JSON.parse(fs.readFileSync(task, "utf8"));
  const told = await (how === "node" ? inNode : inChromium)(library, tasks);
  process.stdout.write(JSON.stringify(told) + "\n", () => process.exit(0));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(String(error).split("\n")[0]);
  process.exit(1);
});
