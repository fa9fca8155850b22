"use strict";
/* The page of a run that goes on: sections as they change, and buttons where the server allows them. */
{
  token.take();
  const name = decodeURIComponent(location.pathname.split("/").pop());
  const api = `/api/runs/${encodeURIComponent(name)}`;
  const OVER = ["DONE", "FAILED", "STOPPED", "CANCELLED"];
  let isDrawing = false;
  let isAsking = false;
  const page = new RunPage(document.getElementById("main"));
  const ACTIONS = [
    ["save", "Save now", `Let ${name} save now and go on?`],
    ["preempt", "Preempt", `Send ${name} the notice of a preemption? It saves and leaves, and is started again.`],
    ["cancel", "Cancel run", `Let ${name} save and leave, and start it no more?`],
  ];

  async function act(action) {
    isAsking = true;
    enableActions();
    const said = document.getElementById("said");
    try {
      const response = await fetch(`${api}/${action}`, { method: "POST", headers: token.headers() });
      said.textContent = await response.text();
    } catch (error) {
      said.textContent = `${action}: ${error.message}`;
    }
    isAsking = false;
    enableActions();
  }

  function enableActions() {
    const { state } = page.status;
    for (const button of page.actions.children) {
      button.disabled = isAsking || OVER.includes(state);
      button.title = OVER.includes(state) ? `The run is ${state}.` : "";
    }
  }

  function showActions() {
    if (!page.actions || page.actions.childElementCount) return;
    page.actions.append(...ACTIONS.map(([action, title, question]) => {
      const button = make("button", { className: "plain", type: "button" }, title);
      button.onclick = async () => (await confirmed(question, title)) && act(action);
      return button;
    }));
  }

  follow(api, (message) => {
    page.apply(message.sections);
    if (!isDrawing) {
      isDrawing = true;
      const source = document.querySelector("link[rel=preload]").href;
      setTimeout(() => Chart.drawWith(make("script", { src: source })), 50); // once the tables are shown
    }
    if (message.actions) showActions();
    if (page.actions?.childElementCount) enableActions();
  }, connection());
}
