// Who uses the page. The token goes to the gateway once and comes back as a cookie that no script can read; nothing here keeps it.
import { computed, signal } from "@preact/signals";
import { unreachable } from "./network";
import { readProblem } from "./problem";

export interface Bearer {
  user: string;
  tenant: string;
}

/** What the gateway says about the person; undefined while nobody is signed in. */
export const bearer = signal<Bearer | undefined>(undefined);

/** Why the person has to sign in again; empty on a first visit. */
export const signInNotice = signal("");

export const signedIn = computed(() => bearer.value !== undefined);

/** Whose the page's content is; empty while nobody is signed in. */
export const owner = computed(() => (bearer.value ? `${bearer.value.tenant}/${bearer.value.user}` : ""));

/** A request of another site cannot carry this header. */
export const OWN_REQUEST = { "x-tailrace-request": "page" };

/** Takes the token that the address brought, or goes on with the session that is there. Resolves once it is known who it is. */
export async function begin(): Promise<void> {
  const token = takeFromFragment();
  if (token) return signIn(token);
  try {
    const response = await fetch("/v1/session", { cache: "no-store", headers: OWN_REQUEST });
    if (response.ok) bearer.value = (await response.json()) as Bearer;
  } catch {
    signInNotice.value = nobodyThere();
  }
}

export async function signIn(token: string): Promise<void> {
  try {
    const response = await fetch("/v1/session", {
      method: "POST",
      cache: "no-store",
      headers: { ...OWN_REQUEST, "content-type": "application/json" },
      body: JSON.stringify({ token }),
    });
    if (response.ok) {
      signInNotice.value = "";
      bearer.value = (await response.json()) as Bearer;
      return;
    }
    const problem = await readProblem(response);
    expire(problem.detail ?? problem.title);
  } catch {
    expire(nobodyThere());
  }
}

/** The session ended by itself: the cookie is of no use any more. */
export function expire(notice: string): void {
  signInNotice.value = notice;
  bearer.value = undefined;
}

/** Takes the cookie away. If that did not reach the gateway, the person is told, because the next visit would find it. */
export async function signOut(): Promise<void> {
  bearer.value = undefined;
  try {
    const response = await fetch("/v1/session", { method: "DELETE", headers: OWN_REQUEST });
    signInNotice.value = response.ok ? "" : NOT_SIGNED_OUT;
  } catch {
    signInNotice.value = NOT_SIGNED_OUT;
  }
}

// Opening the printed address in a tab that shows the page already changes nothing but the fragment.
window.addEventListener("hashchange", () => {
  const token = takeFromFragment();
  if (token) void signIn(token);
});

/** `tailrace up` prints an address that ends in `#token=…`; a fragment is not sent to any server, and it leaves the address bar here. */
function takeFromFragment(): string {
  const found = /^#token=(.+)$/.exec(location.hash)?.[1];
  if (!found) return "";
  history.replaceState(null, "", location.pathname + location.search);
  return decodeURIComponent(found);
}

/** What a refusal for want of a good cookie comes to for a person; what the gateway says of it is for those who write clients. */
export const SIGNED_OUT = { title: "Your sign-in has ended", detail: "Sign in again to go on. What was here is kept, also what you typed." };

const nobodyThere = () => {
  const { title, detail } = unreachable();
  return `${title}. ${detail}`;
};
const NOT_SIGNED_OUT = "Signing out did not reach Tailrace. Sign in and out again before you leave this browser to somebody else.";
