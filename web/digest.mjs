// Writes beside the build what it was made of, so that a test without Node can tell when the build is older than the source.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";

const roots = ["digest.mjs", "index.html", "package-lock.json", "package.json", "public", "src", "tsconfig.json", "vite.config.ts"];
const inside = (folder) =>
  readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => `${entry.parentPath}/${entry.name}`);

const files = roots.flatMap((name) => (name.includes(".") ? [name] : inside(name))).sort();
const digest = createHash("sha256");
for (const file of files) digest.update(`${file}\0`).update(readFileSync(file)).update("\0");
writeFileSync("../services/gateway/static/source.sha256", `${digest.digest("hex")}\n`);
