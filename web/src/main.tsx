import "./style.css";
import { render } from "preact";
import { restore } from "./conversation";
import { App } from "./views/app";

restore();
render(<App />, document.body);
