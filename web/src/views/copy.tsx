import { useSignal } from "@preact/signals";
import { Check, Copy } from "./icons";

const SHOWN_MS = 1_600;

/** Also where the page is served over plain HTTP and the asynchronous clipboard does not exist. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "sr-only";
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Copies the block of code that `button` stands on. */
export async function copyCode(button: HTMLElement): Promise<void> {
  const code = button.closest(".code")?.querySelector("code")?.textContent ?? "";
  if (!(await copyText(code))) return;
  button.textContent = "Copied";
  window.setTimeout(() => (button.textContent = "Copy"), SHOWN_MS);
}

export function CopyButton({ text, label, children }: { text: string; label: string; children?: preact.ComponentChildren }) {
  const copied = useSignal(false);
  const copy = async () => {
    copied.value = await copyText(text);
    window.setTimeout(() => (copied.value = false), SHOWN_MS);
  };
  return (
    <button type="button" class="copy" aria-label={copied.value ? "Copied" : label} title={label} onClick={copy}>
      {children}
      {copied.value ? <Check /> : <Copy />}
    </button>
  );
}
