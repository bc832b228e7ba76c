// The token streams of sockets.py from Node's http, without a library: node stream.mjs PORT
import { once } from "node:events";
import { createServer } from "node:http";

const frame = "data: token\n\n";

async function stream(query, response) {
  const kind = query.get("kind");
  const count = Number(query.get("count"));
  const rate = Number(query.get("rate"));
  const begun = performance.now();
  const group = kind === "burst of 4" ? 4 : 1;
  response.writeHead(200, { "Content-Type": "text/event-stream; charset=utf-8" });
  for (let i = 0; i < count && !response.destroyed; i++) {
    if (kind === "paced") {
      const delay = begun + (i * 1000) / rate - performance.now();
      if (delay > 0) await new Promise((resolve) => setTimeout(resolve, delay));
    } else if (kind !== "unpaced" && i % group === 0) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    if (!response.write(frame)) await once(response, "drain");
  }
  response.end();
}

createServer((request, response) => {
  const url = new URL(request.url, "http://127.0.0.1");
  response.on("error", () => {});
  stream(url.searchParams, response);
}).listen(Number(process.argv[2]), "127.0.0.1");
