// A refusal of the gateway as the problem document it is, or as much of one as can be made of it.
import type { Problem } from "./wire";

export async function readProblem(response: Response): Promise<Problem> {
  const fallback: Problem = { title: `The gateway answered ${response.status}`, status: response.status };
  const traceId = response.headers.get("x-trace-id");
  if (traceId) fallback.trace_id = traceId;
  try {
    return { ...fallback, ...((await response.json()) as Partial<Problem>) };
  } catch {
    return fallback;
  }
}
