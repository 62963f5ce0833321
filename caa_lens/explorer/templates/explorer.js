"use strict";
// Sends what the controls say, and puts what the explorer tells into the page. All HTML was escaped where it was made.
const at = (id) => document.getElementById(id);
const layers = at("asked").dataset.layers.split(",").map(Number);
const maxChars = Number(at("asked").dataset.maxChars);
const signed = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Math.abs(number).toFixed(1);
let socket, busy = false, fresh = {}, waiting, begun = 0, wrong = false;

const multiplier = () => Math.round(Number(at("multiplier").value) * 10) / 10;

function say() {
  at("layer-said").value = layers[Number(at("layer").value)];
  at("multiplier-said").value = signed(multiplier());
  at("tokens-said").value = at("tokens").value;
  at("temperature-said").value = Number(at("temperature").value) || "0 (greedy)";
  const n = [...at("prompt").value].length;
  at("count").textContent = n > maxChars * 0.8 ? `${n} of ${maxChars} characters` : "";
}

function ask() {
  clearTimeout(waiting);
  if (!socket || socket.readyState !== WebSocket.OPEN) return;
  at("error").hidden = true;
  socket.send(JSON.stringify({
    kind: "write",
    prompt: at("prompt").value.slice(0, 150000),
    layer: layers[Number(at("layer").value)],
    multiplier: multiplier(),
    max_new_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    lens: at("with-lens").checked,
  }));
}

function working(now, words) {
  busy = now;
  at("stop").disabled = !now;
  document.body.setAttribute("aria-busy", String(now));
  at("status").textContent = words;
}

function put(side, html, whole) {
  const text = at(side);
  if (whole || fresh[side]) text.innerHTML = "";
  fresh[side] = false;
  text.insertAdjacentHTML("beforeend", html);
}

const told = {
  begun(message) {
    fresh = { unsteered: true, steered: true };
    wrong = false;
    begun = performance.now();
    at("steered-title").textContent = message.title;
    at("error").hidden = true;
    at("notes").replaceChildren();
    working(true, "writing …");
  },
  piece: (message) => put(message.side, message.html, false),
  text(message) {
    put(message.side, message.html, true);
    at("legend").innerHTML = message.legend;
  },
  lens(message) {
    at("lens").innerHTML = message.html;
  },
  note(message) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = message.text;
    at("notes").append(note);
  },
  error(message) {
    wrong = true;
    at("error").textContent = message.text;
    at("error").hidden = false;
    if (!busy) at("status").textContent = "";
  },
  done: () => working(false, wrong ? "" : `done in ${((performance.now() - begun) / 1000).toFixed(1)} s`),
};

function connect() {
  socket = new WebSocket(`ws://${location.host}/texts`);
  socket.onopen = () => {
    at("write").disabled = false;
    at("status").textContent = "ready";
  };
  socket.onmessage = (message) => {
    const said = JSON.parse(message.data);
    told[said.kind](said);
  };
  socket.onclose = () => {
    working(false, "");
    at("write").disabled = true;
    told.error({ text: "The explorer has ended. Start it again, and reload this page." });
  };
}

at("asked").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => {
  socket.send(JSON.stringify({ kind: "stop" }));
  at("status").textContent = "stopping …";
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
at("asked").addEventListener("input", say);
for (const name of ["layer", "multiplier", "tokens", "temperature"]) {
  at(name).addEventListener("change", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 150); // a key held down changes it many times
  });
}
say();
connect();
