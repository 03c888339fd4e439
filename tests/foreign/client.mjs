// SPDX-License-Identifier: Apache-2.0
// A client that shares no code with Cloister: calls health, reflection (v1, v1alpha) and one RPC over mutual TLS.
// Usage: node client.mjs settings.json   Prints one JSON object; what failed is in it as {code, details}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { GrpcReflection } from "grpc-js-reflection-client";

const settings = JSON.parse(readFileSync(process.argv[2], "utf8"));
const here = import.meta.dirname ?? dirname(new URL(import.meta.url).pathname);
const reflectionProtos = join(
  dirname(createRequire(import.meta.url).resolve("grpc-js-reflection-client")), "..", "proto");

const read = (path) => (path ? readFileSync(path) : null);
const credentials = grpc.credentials.createSsl(read(settings.ca), read(settings.key), read(settings.chain));
const options = {
  "grpc.ssl_target_name_override": settings.target_name,
  "grpc.default_authority": settings.target_name,
};

function load(file, includeDirs) {
  return grpc.loadPackageDefinition(loader.loadSync(file, { includeDirs, enums: String, keepCase: true }));
}

function call(client, method, request) {
  return new Promise((resolve) => {
    client[method](request, { deadline: Date.now() + 10_000 }, (error, response) => {
      resolve(error ? { code: error.code, details: error.details, rich: error.metadata?.get("grpc-status-details-bin").length } : response);
    });
  });
}

function listServices(Service) {
  return new Promise((resolve) => {
    const stream = new Service(settings.endpoint, credentials, options).ServerReflectionInfo();
    stream.on("data", (answer) => {
      resolve(answer.list_services_response.service.map((found) => found.name).sort());
      stream.end();
    });
    stream.on("error", (error) => resolve({ code: error.code, details: error.details }));
    stream.write({ list_services: "" });
  });
}

const health = load(join(here, "health.proto"), []).grpc.health.v1;
const evidence = load("cloister/api/common/v1/evidence.proto", [settings.protos]).cloister.api.common.v1;
const v1 = load(join(reflectionProtos, "v1.proto"), []).grpc.reflection.v1;
const v1alpha = load(join(reflectionProtos, "v1alpha.proto"), []).grpc.reflection.v1alpha;

const stub = new evidence.EvidenceService(settings.endpoint, credentials, options);
const result = {
  health: await call(new health.Health(settings.endpoint, credentials, options), "Check", { service: "" }),
  answer: await call(stub, "GetEvidence", { nonce: Buffer.alloc(32), audience: settings.audience ?? "" }),
  reflection_v1: await listServices(v1.ServerReflection),
  reflection_v1alpha: await listServices(v1alpha.ServerReflection),
};
if (!result.answer.code) {
  const reflection = new GrpcReflection(settings.endpoint, credentials, options);
  result.methods = (await reflection.listMethods("cloister.api.common.v1.EvidenceService")).map((m) => m.name);
}
console.log(JSON.stringify(result));
process.exit(0);
