"use strict";
/* The report: the data stands in the page, as it was when it was made. */
{
  const { now, sections } = JSON.parse(document.getElementById("data").textContent);
  words.behind_s = now - Date.now() / 1000;
  const made = new Date(now * 1000);
  document.getElementById("made").textContent = `report of ${made.toLocaleString("sv")}`;
  words.now = () => now;
  new RunPage(document.getElementById("main")).apply(sections);
}
