//! The drawing: boxes inside boxes, as the hardware is, and a line from each GPU to each of its NICs. One SVG file that
//! needs nothing else and is legible on light and on dark.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use topology::{Branch, Device, Gpu, PciAddress, Place};

use super::text::label;
use super::{Facts, cores, kind, name, printable};

const STYLE: &str = "
  svg { --page: #ffffff; --ink: #1c2330; --soft: #5c6675; --edge: #b9c1cd; --box: #f3f5f8; --switch: #e6eaf0;
        --gpu: #d9efd2; --gpu-edge: #4d8b3a; --nic: #d8e6fa; --nic-edge: #3b6fb6; --link: #c2571a; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #12161d; --ink: #e6e9ee; --soft: #9aa5b5; --edge: #414b5a; --box: #1a2029; --switch: #232b37;
          --gpu: #21401a; --gpu-edge: #7cc065; --nic: #1b3357; --nic-edge: #7da9e8; --link: #f08c4a; }
  }
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: var(--ink); }
  .title { font-size: 17px; font-weight: 600; } .place { font-weight: 600; } .soft { fill: var(--soft); font-size: 11px; }
  .page { fill: var(--page); } .numa { fill: var(--box); stroke: var(--edge); } .pci { fill: var(--switch); stroke: var(--edge); }
  .gpu { fill: var(--gpu); stroke: var(--gpu-edge); } .nic { fill: var(--nic); stroke: var(--nic-edge); }
  .idle { stroke-dasharray: 4 3; } .link { stroke: var(--link); stroke-width: 1.5; fill: none; opacity: 0.8; }
";

/// A row of boxes is broken before it is wider.
const ROW_WIDTH_MAX: f64 = 1440.0;
const PADDING: f64 = 12.0;
const GAP: f64 = 8.0;
/// Between GPUs and NICs, for the lines.
const LINKS_HEIGHT: f64 = 36.0;
const LINE_HEIGHT: f64 = 16.0;
const GPU_SIZE: (f64, f64) = (330.0, 56.0);
const NIC_HEIGHT: f64 = 24.0;
/// NICs are as wide as the longest name, up to this.
const NIC_WIDTH_MAX: f64 = 160.0;
/// About what a character of the drawing's text takes.
const CHARACTER_WIDTH: f64 = 6.8;
/// Names of places are bold.
const BOLD_STRETCH: f64 = 1.2;

/// One thing to draw, at its place inside its figure.
struct Shape {
    x: f64,
    y: f64,
    what: What,
}

enum What {
    /// A place, which everything in it is drawn over.
    Container {
        class: &'static str,
        width: f64,
        height: f64,
    },
    Text {
        class: &'static str,
        text: String,
    },
    Gpu {
        address: PciAddress,
        lines: Vec<String>,
    },
    Nic {
        name: String,
        tip: String,
        is_used: bool,
    },
}

/// Shapes and the room they take.
#[derive(Default)]
struct Figure {
    width: f64,
    height: f64,
    shapes: Vec<Shape>,
}

impl Figure {
    fn put(&mut self, x: f64, y: f64, what: What) {
        self.shapes.push(Shape { x, y, what });
    }

    fn place(&mut self, x: f64, y: f64, figure: Figure) {
        self.width = self.width.max(x + figure.width);
        self.height = self.height.max(y + figure.height);
        self.shapes.extend(figure.shapes.into_iter().map(|s| Shape { x: s.x + x, y: s.y + y, ..s }));
    }

    /// Figures of about one width in rows of about one length, from the top, below what is there.
    fn flow(&mut self, mut figures: Vec<Figure>) {
        let widest = figures.iter().map(|figure| figure.width).fold(1.0, f64::max);
        let in_a_row_max = ((ROW_WIDTH_MAX + GAP) / (widest + GAP)).max(1.0) as usize;
        let rows = figures.len().div_ceil(in_a_row_max).max(1);
        let in_a_row = figures.len().div_ceil(rows).max(1);
        for row in 0..rows {
            let rest = figures.split_off(figures.len().min(in_a_row));
            let (mut x, y) = (0.0, if row == 0 { self.height } else { self.height + GAP });
            for figure in std::mem::replace(&mut figures, rest) {
                let width = figure.width;
                self.place(x, y, figure);
                x += width + GAP;
            }
        }
    }

    /// Another below what is there, both in the middle.
    fn stack(self, below: Figure, gap: f64) -> Figure {
        let width = self.width.max(below.width);
        let mut both = Figure::default();
        for figure in [self, below] {
            if figure.height > 0.0 {
                let y = if both.height > 0.0 { both.height + gap } else { 0.0 };
                both.place((width - figure.width) / 2.0, y, figure);
            }
        }
        both
    }

    fn line(&mut self, class: &'static str, text: String) {
        let stretch = if class == "place" { BOLD_STRETCH } else { 1.0 };
        self.width = self.width.max(text.chars().count() as f64 * CHARACTER_WIDTH * stretch);
        self.put(0.0, self.height + 11.0, What::Text { class, text });
        self.height += LINE_HEIGHT;
    }
}

/// GPUs that share NICs, and those of their NICs that are at the same place.
#[derive(Default)]
struct Cell {
    gpus: Vec<Figure>,
    nics: Vec<Figure>,
}

impl Cell {
    fn figure(self) -> Figure {
        let [mut gpus, mut nics] = [Figure::default(), Figure::default()];
        gpus.flow(self.gpus);
        nics.flow(self.nics);
        gpus.stack(nics, LINKS_HEIGHT)
    }
}

/// What every part of the drawing needs to know.
struct Drawing<'a> {
    facts: &'a Facts,
    used: BTreeSet<&'a str>,
    nic_width: f64,
}

pub(super) fn drawing(facts: &Facts) -> String {
    let mut figure = Figure::default();
    let used = facts.pairing.gpus.iter().chain(&facts.host_ranks).flat_map(|of| &of.nics);
    let used: BTreeSet<&str> = used.map(String::as_str).collect();
    let rdma = facts.snapshot.rdma_devices.iter().map(|nic| nic.name.as_str());
    let longest = used.iter().copied().chain(rdma).map(|name| name.chars().count()).max().unwrap_or(0);
    let nic_width = (longest as f64 * CHARACTER_WIDTH + 2.0 * PADDING).min(NIC_WIDTH_MAX);
    let drawing = Drawing { facts, used, nic_width };
    figure.put(0.0, 14.0, What::Text { class: "title", text: facts.title() });
    figure.width = facts.title().chars().count() as f64 * CHARACTER_WIDTH * 1.5;
    figure.height = 30.0;
    figure.flow(vec![drawing.contents(&facts.snapshot.tree())]);
    figure.height += GAP;
    for (rank, of) in facts.host_ranks.iter().enumerate() {
        let nics = if of.nics.is_empty() { String::new() } else { format!("{} ", of.nics.join(", ")) };
        figure
            .line("", clipped(&format!("rank {rank}: {nics}({}); {}", of.reason, cores(of)), ROW_WIDTH_MAX));
    }
    for remark in facts.remarks() {
        figure.line("soft", clipped(&remark, ROW_WIDTH_MAX));
    }
    let mut page = Figure::default();
    page.place(2.0 * PADDING, 2.0 * PADDING, figure);
    (page.width, page.height) = (page.width + 2.0 * PADDING, page.height + 2.0 * PADDING);
    drawing.written(&page)
}

impl Drawing<'_> {
    /// A place with its name and an edge.
    fn container(&self, branch: &Branch<Device<'_>>) -> Figure {
        let mut inside = Figure::default();
        inside.line("place", label(&self.facts.snapshot, branch.place));
        inside.height += GAP / 2.0;
        inside.flow(vec![self.contents(branch)]);
        let class = if matches!(branch.place, Some(Place::NumaNode(_))) { "numa" } else { "pci" };
        let (width, height) = (inside.width + 2.0 * PADDING, inside.height + 2.0 * PADDING);
        let mut figure = Figure::default();
        figure.put(0.0, 0.0, What::Container { class, width, height });
        figure.place(PADDING, PADDING, inside);
        Figure { width, height, ..figure }
    }

    /// GPUs above their NICs, then NICs without a GPU here, then what has no rail, then the places below.
    fn contents(&self, branch: &Branch<Device<'_>>) -> Figure {
        let mut cells: Vec<Cell> = Vec::new();
        let mut cell_of: BTreeMap<&str, usize> = BTreeMap::new();
        for device in &branch.devices {
            let Device::Gpu(gpu) = device else { continue };
            let nics = self.facts.of(gpu.pci.address).map_or(&[][..], |of| &of.nics);
            let at = nics.iter().find_map(|nic| cell_of.get(nic.as_str())).copied().unwrap_or(cells.len());
            if at == cells.len() {
                cells.push(Cell::default());
            }
            cells[at].gpus.push(self.gpu(gpu));
            cell_of.extend(nics.iter().map(|nic| (nic.as_str(), at)));
        }
        let (mut lone, mut others) = (Vec::new(), Vec::new());
        for &device in &branch.devices {
            let is_rdma_hardware = matches!(device, Device::Rdma(nic) if nic.pci.is_some());
            let name = name(device);
            match cell_of.get(name.as_str()) {
                _ if matches!(device, Device::Gpu(_)) => {}
                Some(&at) => cells[at].nics.push(self.nic(device)),
                None if is_rdma_hardware || self.used.contains(name.as_str()) => lone.push(self.nic(device)),
                None => others.push(name),
            }
        }
        let mut figure = Figure::default();
        for row in [cells.into_iter().map(Cell::figure).collect(), lone] {
            figure.height += if figure.height > 0.0 && !row.is_empty() { GAP } else { 0.0 };
            figure.flow(row);
        }
        if !others.is_empty() {
            figure.height += GAP / 2.0;
            let width = figure.width.max(GPU_SIZE.0);
            figure.line("soft", clipped(&format!("also here: {}", others.join(", ")), width));
        }
        figure.height += if figure.height > 0.0 && !branch.branches.is_empty() { GAP } else { 0.0 };
        figure.flow(branch.branches.iter().map(|below| self.container(below)).collect());
        figure
    }

    fn gpu(&self, gpu: &Gpu) -> Figure {
        let mut lines = vec![format!("GPU {}", gpu.pci.address)];
        lines.extend(gpu.model.clone());
        lines.extend(self.facts.of(gpu.pci.address).map(cores));
        let mut figure = Figure { width: GPU_SIZE.0, height: GPU_SIZE.1, ..Figure::default() };
        figure.put(0.0, 0.0, What::Gpu { address: gpu.pci.address, lines });
        figure
    }

    fn nic(&self, device: Device<'_>) -> Figure {
        let is_used = self.used.contains(name(device).as_str());
        let mut figure = Figure { width: self.nic_width, height: NIC_HEIGHT, ..Figure::default() };
        let tip = kind(device).unwrap_or_default();
        figure.put(0.0, 0.0, What::Nic { name: name(device), tip, is_used });
        figure
    }

    /// Containers lie under the lines, and the lines under GPUs and NICs.
    fn written(&self, page: &Figure) -> String {
        let (mut under, mut over) = (String::new(), String::new());
        for Shape { x, y, what } in &page.shapes {
            // Writing into a string cannot fail.
            let _ = match what {
                What::Container { class, width, height } => writeln!(
                    under,
                    r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" rx="6"/>"#
                ),
                What::Text { class, text } => {
                    writeln!(under, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escaped(text))
                }
                What::Gpu { address: _, lines } => write_gpu(&mut over, *x, *y, lines),
                What::Nic { name, tip, is_used } => {
                    let class = if *is_used { "nic" } else { "nic idle" };
                    write_nic(&mut over, (*x, *y), self.nic_width, class, [name, tip])
                }
            };
        }
        let (width, height) = (page.width.ceil(), page.height.ceil());
        let (title, links) = (escaped(&self.facts.title()), self.links(page));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n{under}{links}{over}</svg>\n"
        )
    }

    /// A curve from the foot of each GPU to the head of each of its NICs.
    fn links(&self, page: &Figure) -> String {
        let heads: BTreeMap<&str, (f64, f64)> = page
            .shapes
            .iter()
            .filter_map(|shape| match &shape.what {
                What::Nic { name, .. } => Some((name.as_str(), (shape.x + self.nic_width / 2.0, shape.y))),
                _ => None,
            })
            .collect();
        let mut svg = String::new();
        for Shape { x, y, what } in &page.shapes {
            let What::Gpu { address, .. } = what else { continue };
            let (x, y) = (x + GPU_SIZE.0 / 2.0, y + GPU_SIZE.1);
            let of = self.facts.of(*address);
            for (to_x, to_y) in of.iter().flat_map(|of| &of.nics).filter_map(|nic| heads.get(nic.as_str())) {
                let (bend, to_bend) = (y + LINKS_HEIGHT / 2.0, to_y - LINKS_HEIGHT / 2.0);
                let _ = writeln!(
                    svg,
                    r#"<path class="link" d="M {x:.1} {y:.1} C {x:.1} {bend:.1} {to_x:.1} {to_bend:.1} {to_x:.1} {to_y:.1}"/>"#
                );
            }
        }
        svg
    }
}

fn write_gpu(svg: &mut String, x: f64, y: f64, lines: &[String]) -> fmt::Result {
    let (width, height) = GPU_SIZE;
    writeln!(svg, r#"<rect class="gpu" x="{x:.1}" y="{y:.1}" width="{width}" height="{height}" rx="4"/>"#)?;
    for (row, (line, class)) in lines.iter().zip(["place", "", "soft"]).enumerate() {
        let (x, y) = (x + GAP, y + LINE_HEIGHT * (row + 1) as f64);
        let text = escaped(&clipped(line, width - 2.0 * GAP));
        writeln!(svg, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{text}</text>"#)?;
    }
    Ok(())
}

fn write_nic(
    svg: &mut String,
    at: (f64, f64),
    width: f64,
    class: &str,
    [name, tip]: [&str; 2],
) -> fmt::Result {
    let (text, tip) = (escaped(&clipped(name, width - GAP)), escaped(&format!("{name}: {tip}")));
    let (x, y) = at;
    writeln!(
        svg,
        r#"<g><title>{tip}</title><rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{NIC_HEIGHT}" rx="4"/>"#
    )?;
    let (x, y) = (x + width / 2.0, y + LINE_HEIGHT);
    writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="middle">{text}</text></g>"#)
}

/// As much of a text as fits.
fn clipped(text: &str, width: f64) -> String {
    let room = (width / CHARACTER_WIDTH) as usize;
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

fn escaped(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
