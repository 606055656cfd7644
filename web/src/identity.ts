// Who uses the page: one bearer token, for this tab only. The token is never put into an address, a cookie or the page itself.
import { computed, signal } from "@preact/signals";

const KEY = "tailrace.token";

const token = signal(takeFromFragment() ?? sessionStorage.getItem(KEY) ?? "");

/** Why the person has to sign in again; empty on a first visit. */
export const signInNotice = signal("");

export const signedIn = computed(() => token.value !== "");

/** What the token says about its bearer. For display only: the gateway decides. */
export const bearer = computed(() => claims(token.value));

/** Whose the page's content is; empty while nobody is signed in. */
export const owner = computed(() => {
  if (!signedIn.value) return "";
  return bearer.value ? `${bearer.value.tenant}/${bearer.value.user}` : token.value;
});

export function bearerToken(): string {
  return token.peek();
}

export function signIn(value: string): void {
  sessionStorage.setItem(KEY, value);
  signInNotice.value = "";
  token.value = value;
}

export function signOut(notice = ""): void {
  sessionStorage.removeItem(KEY);
  signInNotice.value = notice;
  token.value = "";
}

// Opening the printed address in a tab that shows the page already changes nothing but the fragment.
window.addEventListener("hashchange", () => {
  const taken = takeFromFragment();
  if (taken) signIn(taken);
});

/** `tailrace up` prints an address that ends in `#token=…`; a fragment is not sent to any server, and it leaves the address bar here. */
function takeFromFragment(): string | null {
  const found = /^#token=(.+)$/.exec(location.hash)?.[1];
  if (!found) return null;
  history.replaceState(null, "", location.pathname + location.search);
  const value = decodeURIComponent(found);
  sessionStorage.setItem(KEY, value);
  return value;
}

function claims(value: string): { user: string; tenant: string } | undefined {
  try {
    const payload = (value.split(".")[1] ?? "").replace(/-/g, "+").replace(/_/g, "/");
    const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
    const { sub, tenant } = JSON.parse(new TextDecoder().decode(bytes)) as Record<string, unknown>;
    return { user: String(sub ?? ""), tenant: String(tenant ?? "") };
  } catch {
    return undefined;
  }
}
