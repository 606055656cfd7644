// The few symbols the page uses, drawn on a 16 px grid in the colour of the text.
import type { ComponentChildren } from "preact";

function Icon({ children }: { children: ComponentChildren }) {
  return (
    <svg class="icon" viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
      {children}
    </svg>
  );
}

export const Send = () => (
  <Icon>
    <path d="M8 13V3.2M3.8 7.2 8 3l4.2 4.2" />
  </Icon>
);
export const Stop = () => (
  <Icon>
    <rect x="4" y="4" width="8" height="8" rx="1.5" fill="currentColor" stroke="none" />
  </Icon>
);
export const Close = () => (
  <Icon>
    <path d="m4 4 8 8M12 4l-8 8" />
  </Icon>
);
export const Back = () => (
  <Icon>
    <path d="M10 3.5 5.5 8l4.5 4.5" />
  </Icon>
);
export const Forward = () => (
  <Icon>
    <path d="M6 3.5 10.5 8 6 12.5" />
  </Icon>
);
export const Copy = () => (
  <Icon>
    <rect x="5.5" y="5.5" width="7.5" height="7.5" rx="1.5" />
    <path d="M10.5 5.5V4.2A1.2 1.2 0 0 0 9.3 3H4.2A1.2 1.2 0 0 0 3 4.2v5.1a1.2 1.2 0 0 0 1.2 1.2h1.3" />
  </Icon>
);
export const Check = () => (
  <Icon>
    <path d="m3.5 8.5 3 3 6-7" />
  </Icon>
);
export const Plus = () => (
  <Icon>
    <path d="M8 3.5v9M3.5 8h9" />
  </Icon>
);
export const Upload = () => (
  <Icon>
    <path d="M8 10.5V3M5 5.8 8 3l3 2.8M3 10.5v1.3A1.2 1.2 0 0 0 4.2 13h7.6a1.2 1.2 0 0 0 1.2-1.2v-1.3" />
  </Icon>
);
export const Warning = () => (
  <Icon>
    <path d="M8 5.8v3M8 11.2v.1M7.1 2.8 1.9 11.7A1.1 1.1 0 0 0 2.8 13.3h10.4a1.1 1.1 0 0 0 .9-1.6L8.9 2.8a1 1 0 0 0-1.8 0Z" />
  </Icon>
);

export const Mark = () => (
  <svg class="mark" viewBox="0 0 32 32" width="26" height="26" aria-hidden="true">
    <rect class="mark-ground" width="32" height="32" rx="8" />
    <g fill="none" stroke="#fff" stroke-linecap="round" stroke-width="2.6">
      <path d="M6 11.5c3.3-3 6.7-3 10 0s6.7 3 10 0" />
      <path d="M6 17.5c3.3-3 6.7-3 10 0s6.7 3 10 0" opacity=".72" />
      <path d="M6 23.5c3.3-3 6.7-3 10 0" opacity=".45" />
    </g>
  </svg>
);
