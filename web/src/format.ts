// Numbers as people read them. Money stays an integer until it is a string: no float touches it.

const whole = new Intl.NumberFormat("en-US");

export function count(value: number | string): string {
  return whole.format(typeof value === "string" ? BigInt(value) : value);
}

export function plural(value: number, one: string, many = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Exact: every nano-USD that was charged is shown, and no digit that was not. */
export function usd(nano: string): string {
  const value = BigInt(nano);
  const digits = (value < 0n ? -value : value).toString().padStart(10, "0");
  const cents = digits.slice(-9).replace(/0+$/, "").padEnd(2, "0");
  return `${value < 0n ? "−" : ""}$${whole.format(BigInt(digits.slice(0, -9)))}.${cents}`;
}

export function duration(ms: number): string {
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return `${(ms / 1000).toFixed(2)} s`;
}

export function age(seconds: string): string {
  const value = Number(seconds);
  if (value < 60) return `${value} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86_400) return `${Math.floor(value / 3600)} h`;
  return `${Math.floor(value / 86_400)} d`;
}

export function bytes(value: number): string {
  if (value < 1000) return `${value} B`;
  if (value < 1_000_000) return `${(value / 1000).toFixed(value < 10_000 ? 1 : 0)} kB`;
  return `${(value / 1_000_000).toFixed(1)} MB`;
}

export function day(timestamp: string): string {
  const date = new Date(timestamp);
  if (Number.isNaN(date.getTime())) return "";
  return date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
