// What a person leaves in the tab, and when it goes: with an expired token it stays for the same person, for another it never does.
import { draft, forgetCollection, restore, startNew } from "./conversation";
import { forgetDocuments } from "./documents";
import { owner, signOut } from "./identity";
import { forgetSessions } from "./sessions";

let last = owner.peek();

export function bringBack(): void {
  restore();
  owner.subscribe((now) => {
    if (now && last && now !== last) forget();
    last = now || last;
  });
}

export function leave(): void {
  forget();
  void signOut();
}

function forget(): void {
  startNew();
  draft.value = "";
  forgetCollection();
  forgetDocuments();
  forgetSessions();
}
