import "./style.css";
import { render } from "preact";
import { bringBack } from "./belongings";
import { begin } from "./identity";
import { App } from "./views/app";

await begin();
bringBack();
render(<App />, document.body);
