//! Prints this host, or a tree copied from another, as JSON: `cargo run -p topology --example snapshot [ROOT]`.

use std::path::Path;

use topology::{Roots, Snapshot};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let roots = std::env::args_os().nth(1).map_or_else(Roots::default, |root| Roots::below(Path::new(&root)));
    println!("{}", serde_json::to_string_pretty(&Snapshot::read(&roots)?)?);
    Ok(())
}
