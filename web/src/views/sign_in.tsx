import { useSignal } from "@preact/signals";
import { signIn, signInNotice } from "../identity";
import { Mark } from "./icons";

export function SignIn() {
  const value = useSignal("");
  const submit = (event: Event) => {
    event.preventDefault();
    const token = value.value.trim().replace(/^Bearer\s+/i, "");
    if (token) void signIn(token);
  };
  return (
    <main class="sign-in">
      <form class="card" onSubmit={submit}>
        <Mark />
        <h1>Sign in to Tailrace</h1>
        <p>
          Paste an access token. <code>make run</code> prints an address that carries one, and <code>tailrace token</code> makes more.
        </p>
        {signInNotice.value && (
          <p class="notice bad" role="alert">
            {signInNotice.value}
          </p>
        )}
        <label for="token">Access token</label>
        <input
          id="token"
          type="password"
          autocomplete="off"
          spellcheck={false}
          required
          autofocus
          value={value.value}
          onInput={(event) => (value.value = event.currentTarget.value)}
        />
        <button type="submit" class="primary">
          Sign in
        </button>
        <p class="fine">The token becomes a cookie that no script can read. It ends with the token, or when you sign out.</p>
      </form>
    </main>
  );
}
