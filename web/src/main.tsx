import "./style.css";
import { render } from "preact";
import { bringBack } from "./belongings";
import { App } from "./views/app";

bringBack();
render(<App />, document.body);
