import { busy } from "../conversation";
import { age, count, duration, usd } from "../format";
import type { Cache, Done } from "../wire";
import { CopyButton } from "./copy";

/** The cost line: what was paid, to whom, how long it took, and what the cache had to say. */
export function Receipt({ receipt, refresh }: { receipt: Done; refresh: () => void }) {
  const { usage = NO_USAGE, cache = NO_VERDICT } = receipt;
  const hit = cache.verdict === "exact" || cache.verdict === "semantic" || cache.verdict === "coalesced";
  const cached = BigInt(usage.cache_read_tokens) + BigInt(usage.cache_write_tokens);
  return (
    <footer class="receipt" aria-label="Receipt">
      <strong title={receipt.estimated ? "Some counts are estimates: the provider did not report them" : "Cost"}>
        {receipt.estimated && "≈ "}
        {usd(receipt.cost_nanousd)}
      </strong>
      {hit && <span class="badge">{hitText(cache)}</span>}
      {hit && BigInt(cache.saved_nanousd) > 0n && <span>saved {usd(cache.saved_nanousd)}</span>}
      {hit && cache.age_s !== undefined && <span>{age(cache.age_s)} old</span>}
      <span title={`Provider: ${receipt.provider}`}>{receipt.model}</span>
      {receipt.tier && <span>{receipt.tier}</span>}
      <span title={cached > 0n ? `${count(usage.cache_read_tokens)} read from and ${count(usage.cache_write_tokens)} written to the provider's prompt cache` : "Tokens in and out"}>
        {count((BigInt(usage.input_tokens) + cached).toString())} in, {count(usage.output_tokens)} out
      </span>
      {!hit && <span>{missText(cache)}</span>}
      <span>first token {duration(receipt.first_token_ms)}</span>
      <span>total {duration(receipt.duration_ms)}</span>
      <CopyButton text={receipt.trace_id} label={`Copy the trace id ${receipt.trace_id}`}>
        trace <code>{receipt.trace_id.slice(0, 8)}</code>
      </CopyButton>
      {hit && (
        <button type="button" class="link" disabled={busy.value} onClick={refresh} title="Ask again without the cache">
          Answer afresh
        </button>
      )}
      {cache.verdict === "semantic" && cache.source_question && <p class="fine">Answered before as “{cache.source_question}”</p>}
    </footer>
  );
}

const NO_USAGE = { input_tokens: "0", output_tokens: "0", cache_read_tokens: "0", cache_write_tokens: "0" };
const NO_VERDICT: Cache = { verdict: "off", saved_nanousd: "0", reason: "" };

function hitText(cache: Cache): string {
  if (cache.verdict === "exact") return "cached, same question";
  if (cache.verdict === "coalesced") return "shared with a running answer";
  return `cached, similarity ${(cache.similarity ?? 0).toFixed(3)}`;
}

function missText(cache: Cache): string {
  const verdict = cache.verdict === "off" ? "cache off" : "cache miss";
  return cache.reason ? `${verdict}: ${cache.reason.replaceAll("_", " ")}` : verdict;
}
