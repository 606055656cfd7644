import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import type { Answer } from "../answer";
import { count, duration, usd } from "../format";
import type { Step } from "../wire";

const NAMES: Record<string, string> = {
  recall: "Look for a known answer",
  passages: "Find passages",
  history: "Read the conversation",
  rewrite: "Understand the follow-up",
  follow: "Follow the same question",
  compose: "Compose the prompt",
  hold: "Reserve the cost",
  generate: "Write the answer",
  tool: "Use a tool",
  resume: "Take up the results",
  validate: "Check the answer",
  record: "Book it",
  remember: "Remember the answer",
};

const FACTS_MAX = 3;
const TICK_MS = 100;

/** The steps as they happen, each with its time and its place in the whole. */
export function Steps({ answer }: { answer: Answer }) {
  const steps = answer.steps.value;
  const running = answer.running.value;
  const elapsed = useElapsed(answer);
  const total = Math.max(answer.receipt.value?.duration_ms ?? 0, 1, elapsed, ...steps.map((step) => step.started_ms + step.duration_ms));
  return (
    <aside class="steps" aria-label="Steps">
      <h3>
        Steps {answer.receipt.value && <span>{duration(answer.receipt.value.duration_ms)}</span>}
      </h3>
      <ol>
        {steps.map((step) => (
          <Row key={step.name} step={step} status={statusOf(step, answer)} elapsed={elapsed} total={total} />
        ))}
        {running && steps.length === 0 && (
          <li class="step running">
            <span class="dot" />
            <span class="step-name">{answer.phase.value === "reconnecting" ? "Reconnect" : "Send the question"}</span>
          </li>
        )}
      </ol>
    </aside>
  );
}

type Status = Step["status"] | "stopped" | "cut";

/** A stop ends what runs, which the gateway can only call failed; a step did fail by itself if another began after it, beside the
 * booking, which comes after every end. */
function statusOf(step: Step, answer: Answer): Status {
  const stop = answer.stopping.value || answer.phase.value === "stopped";
  if (step.status === "running" && !answer.running.value) return stop ? "stopped" : "cut";
  if (step.status !== "failed" || !stop) return step.status;
  const end = step.started_ms + step.duration_ms;
  return answer.steps.value.some(({ name, started_ms }) => name !== "record" && started_ms >= end) ? "failed" : "stopped";
}

function Row({ step, status, elapsed, total }: { step: Step; status: Status; elapsed: number; total: number }) {
  const timeless = status === "skipped" || status === "stopped" || status === "cut";
  const took = step.status === "running" ? Math.max(0, elapsed - step.started_ms) : step.duration_ms;
  return (
    <li class={`step ${status}`} data-step={step.name}>
      <span class="dot" />
      <span class="step-name">{NAMES[step.name] ?? step.name}</span>
      <span class="step-time">{timeless ? status : duration(took)}</span>
      <span class="step-facts">{factsOf(step)}</span>
      <svg class="bar" width="100%" height="3" aria-hidden="true">
        <rect class="bar-ground" width="100%" height="3" rx="1.5" />
        {!timeless && (
          <rect class="bar-fill" x={place(step.started_ms, total)} width={length(took, total)} height="3" rx="1.5" />
        )}
      </svg>
      <span class="sr-only">{status}</span>
    </li>
  );
}

/** Milliseconds since the question was taken on, ticking while the answer runs; 0 once it has ended. */
function useElapsed(answer: Answer): number {
  const elapsed = useSignal(0);
  const running = answer.running.value;
  useEffect(() => {
    if (!running) return;
    const timer = window.setInterval(() => (elapsed.value = answer.elapsed()), TICK_MS);
    return () => {
      window.clearInterval(timer);
      elapsed.value = 0;
    };
  }, [running]);
  return elapsed.value;
}

const place = (start: number, total: number) => `${Math.min(99.2, (100 * start) / total).toFixed(2)}%`;

/** At least a trace that can be seen. */
const length = (took: number, total: number) => `${Math.min(100, Math.max(0.8, (100 * took) / total)).toFixed(2)}%`;

/** Facts that say enough without their name. */
const SPEAKING = new Set(["reason", "cache", "verdict", "model", "provider", "semantic"]);

/** Facts for operators, or that the receipt shows better. */
const HIDDEN = new Set(["epoch", "template", "messages", "price_version", "cost_nanousd"]);

function factsOf({ facts }: Step): string {
  return Object.entries(facts)
    .filter(([name, value]) => value && !HIDDEN.has(name) && !(name === "attempt" && value === "1"))
    .slice(0, FACTS_MAX)
    .map(([name, value]) => fact(name, value))
    .join(" · ");
}

function fact(name: string, value: string): string {
  // It is durable, and only the ledger's word was not waited for.
  if (name === "booked" && /^false$/i.test(value)) return "on its way to the books";
  if (SPEAKING.has(name)) return words(value);
  if (/^true$/i.test(value)) return words(name);
  if (/^false$/i.test(value)) return `not ${words(name)}`;
  if (!/^\d+$/.test(value)) return `${words(name)} ${value}`;
  if (name.endsWith("_nanousd")) return `${usd(value)} ${words(name.slice(0, -"_nanousd".length))}`;
  if (name.endsWith("_max")) return `at most ${count(value)} ${words(name.slice(0, -"_max".length))}`;
  return `${count(value)} ${words(name)}`;
}

const words = (name: string) => name.replaceAll("_", " ");
