import { defineConfig } from "vite";

// Where `npm run dev` finds a running gateway.
const gateway = "http://127.0.0.1:8080";

export default defineConfig({
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../services/gateway/static",
    emptyOutDir: true,
    target: "es2022",
    // The page's content policy allows no inline script and no data: font, so nothing is inlined.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
    license: { fileName: "third-party-licenses.md" },
  },
  server: { proxy: { "/v1": gateway } },
});
