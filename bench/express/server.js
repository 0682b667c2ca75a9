// The official proxy set up as its README says. Only the body limit is raised: Express refuses more than 100 kB as it comes.
"use strict";
const express = require("express");
const falProxy = require("@fal-ai/server-proxy/express");

const BACKLOG = 4096; // Node's 511 makes the 2,000 connections of the slow workload wait for a repeated SYN

const app = express();
app.use(express.json({ limit: "200mb" }));
app.all(falProxy.route, falProxy.handler);
app.listen({ port: Number(process.env.PORT), host: "127.0.0.1", backlog: BACKLOG });
