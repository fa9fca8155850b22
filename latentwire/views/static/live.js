"use strict";
/* The connection to the server: a stream of messages, and the token that some servers want. */

const token = {
  /** From the address, where it stands behind the # that no server sees; kept for this tab. */
  take() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given) {
      sessionStorage.setItem("token", given);
      history.replaceState(null, "", location.pathname + location.search);
    }
  },
  headers() {
    const known = sessionStorage.getItem("token");
    return known ? { Authorization: `Bearer ${known}` } : {};
  },
};

/** Follow a stream for ever; `take` gets each message, `tell` how the connection is. */
async function follow(path, take, tell) {
  let pause_s = 1;
  for (;;) {
    try {
      const response = await fetch(path, { headers: token.headers(), cache: "no-store" });
      if (response.status === 401) {
        const wasGiven = Boolean(token.headers().Authorization);
        await askForToken(wasGiven ? "That is not the token that this dashboard was started with." : "This dashboard wants the token that it was started with.");
        continue;
      }
      if (!response.ok) throw new Error(await response.text());
      tell("live", true);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        pause_s = 1;
        const messages = (rest + value).split("\n\n");
        rest = messages.pop();
        for (const message of messages) {
          if (!message.startsWith("data: ")) continue; // a comment that keeps the connection open
          const parsed = JSON.parse(message.slice(6));
          words.behind_s = parsed.now - Date.now() / 1000;
          take(parsed);
        }
      }
      tell("connection lost", false);
    } catch (error) {
      tell(`not connected: ${error.message}`, false);
    }
    await new Promise((resolve) => setTimeout(resolve, pause_s * 1000));
    pause_s = Math.min(10, pause_s * 2);
  }
}

function askForToken(why) {
  return new Promise((resolve) => {
    const input = make("input", { type: "password", autocomplete: "off", required: true, ariaLabel: "Token" });
    const form = make("form", { method: "dialog" }, make("p", {}, why),
      input, " ", make("button", { className: "plain" }, "Open"));
    const dialog = make("dialog", {}, form);
    dialog.addEventListener("close", () => {
      if (input.value) sessionStorage.setItem("token", input.value.trim());
      dialog.remove();
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Ask a question that has to be answered before something is done. */
function confirmed(question, doIt) {
  return new Promise((resolve) => {
    const dialog = make("dialog", {}, make("form", { method: "dialog" }, make("p", {}, question),
      make("button", { className: "plain", value: "yes" }, doIt), " ", make("button", { className: "plain", value: "no" }, "Leave it")));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Shows in the head of the page how the connection is. */
function connection() {
  const box = document.getElementById("connection");
  return (text, isLive) => {
    box.textContent = isLive ? `● ${text}` : `○ ${text}`;
    box.className = `end ${isLive ? "good" : "bad"}`;
  };
}
