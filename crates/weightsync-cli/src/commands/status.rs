//! `weightsync status`: what a running job does, asked of its controller: live on a terminal, once otherwise.
//!
//! It joins nothing and changes nothing. The text and the JSON have the same facts.

mod facts;
mod text;

use std::time::Duration;

use anyhow::Context;
use console::Term;
use weightsync::Observer;

use crate::args::StatusArgs;
use crate::say::say;
use facts::Facts;

/// How often it is drawn anew.
const REDRAW: Duration = Duration::from_millis(500);

/// Of a file or a pipe, which have none.
const WIDTH_DEFAULT: usize = 80;

pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let who = || format!("controller {}", args.asked());
    let mut observer = Observer::connect(args.client()?).await.with_context(who)?;
    let term = Term::stdout();
    let live = term.is_term() && !args.once && !args.json;
    let mut drawn = 0;
    loop {
        // A controller that goes takes nothing along: what was drawn last stays.
        let Some(status) = observer.status().await.with_context(who)? else {
            say!("the job is over");
            return Ok(());
        };
        let facts = Facts::new(args.asked(), status);
        if args.json {
            say!("{}", serde_json::to_string(&facts)?);
            return Ok(());
        }
        if !live {
            text::lines(&facts, WIDTH_DEFAULT, usize::MAX).iter().for_each(|line| say!("{line}"));
            return Ok(());
        }
        let (height, width) = term.size();
        // Less than the terminal has: a line more would scroll, and could not be taken back.
        let lines = text::lines(&facts, usize::from(width), usize::from(height).saturating_sub(1));
        // What is narrower now than it was drawn has been wrapped: what is above may stay, never what is wrong.
        term.clear_last_lines(drawn)?;
        lines.iter().try_for_each(|line| term.write_line(line))?;
        drawn = lines.len();
        tokio::time::sleep(REDRAW).await;
    }
}
