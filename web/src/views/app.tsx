import { leave } from "../belongings";
import { startNew } from "../conversation";
import { bearer, signedIn } from "../identity";
import { view } from "../route";
import { AskView } from "./ask";
import { ConversationsView } from "./conversations";
import { DocumentsView } from "./documents";
import { Mark, Plus } from "./icons";
import { SignIn } from "./sign_in";

export function App() {
  if (!signedIn.value) return <SignIn />;
  return (
    <>
      <a class="skip" href="#question" onClick={toQuestion}>
        Skip to the question box
      </a>
      <Header />
      {view.value === "ask" ? <AskView /> : view.value === "documents" ? <DocumentsView /> : <ConversationsView />}
    </>
  );
}

// The fragment chooses the view, so the link moves the focus by itself.
function toQuestion(event: Event) {
  event.preventDefault();
  document.getElementById("question")?.focus();
}

function Header() {
  const current = (name: string) => (view.value === name ? { "aria-current": "page" as const } : {});
  const fresh = () => {
    startNew();
    location.hash = "";
    document.getElementById("question")?.focus();
  };
  return (
    <header class="top">
      <a class="brand" href="#" {...(view.value === "ask" ? {} : { "aria-label": "Tailrace, back to the conversation" })}>
        <Mark />
        <span>Tailrace</span>
      </a>
      <nav aria-label="Views">
        <a href="#" {...current("ask")}>
          Ask
        </a>
        <a href="#documents" {...current("documents")}>
          Documents
        </a>
        <a href="#conversations" {...current("conversations")}>
          History
        </a>
      </nav>
      <div class="top-end">
        <button type="button" class="quiet" onClick={fresh} aria-label="New conversation" title="New conversation (Ctrl or ⌘ + Shift + O)">
          <Plus /> <span>New conversation</span>
        </button>
        {bearer.value && (
          <span class="bearer" title={`Tenant ${bearer.value.tenant}`}>
            {bearer.value.user}
          </span>
        )}
        <button type="button" class="quiet" onClick={leave}>
          Sign out
        </button>
      </div>
    </header>
  );
}
