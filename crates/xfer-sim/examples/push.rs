//! Simulates the push of a model between p5 hosts: `cargo run --release -p xfer-sim --example push -- kimi-k2 256 128 never`.

use xfer_plan::model::{JobSpec, Machine};
use xfer_sim::{JobConfig, Preset, simulate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, from, to) = (args[0].as_str(), args[1].as_str(), args[2].as_str());
    let (trainers, receivers): (u32, u32) = (args[3].parse()?, args[4].parse()?);
    let cluster = Preset::P5.cluster(trainers, receivers);
    let machine = Machine { bytes_per_second: cluster.nic.payload_bytes_per_second(), ..Machine::default() };
    let machine = format!(
        r#"{{"gpus_per_host": 8, "rails_per_gpu": 4, "bytes_per_second": {}}}"#,
        machine.bytes_per_second
    );
    let fp8 = if args[6] == "fp8" { r#", "fp8": {"block": [128, 128], "scales": "f32"}"# } else { "" };
    let chunk: u64 = args.get(7).map_or(Ok(1024), |chunk| chunk.parse())?;
    let job = format!(
        r#"{{"model": {{"preset": "{model}"}},
            "trainers": {{"layout": "{from}", "gpus": {trainers}, "machine": {machine}}},
            "receivers": {{"layout": "{to}", "gpus": {receivers}, "machine": {machine}{fp8}}},
            "options": {{"relay": "{}", "chunk_bytes_max": {}, "gather_chunk_bytes_max": {}}}}}"#,
        args[5],
        chunk << 10,
        chunk << 10
    );
    let started = std::time::Instant::now();
    let mut config = JobConfig::new(cluster, JobSpec::from_json(&job)?.manifest()?);
    if let Some(tolerance) = args.get(8) {
        config.tolerance = tolerance.parse()?;
    }
    println!("manifest after {:?}", started.elapsed());
    let report = simulate(&config, &mut |progress| {
        eprint!(
            "\r{} {} events {:.1} %   ",
            progress.at,
            progress.events,
            100.0 * progress.delivered_bytes as f64 / progress.total_bytes.max(1) as f64
        );
    })?;
    println!(
        "\nafter {:?}: {} events, bound {:.4} by {:?}, {} bytes {} writes, relayed {}",
        started.elapsed(),
        report.events,
        report.bound_seconds,
        report.bound_by,
        report.bytes,
        report.writes,
        report.relayed_bytes
    );
    for push in &report.pushes {
        println!("simulated: version {} in {:.4} s, last {}", push.version, push.seconds, push.last);
        for stage in &push.critical_path {
            println!("  {:24} {:9.3} ms", stage.stage.text(), stage.seconds * 1e3);
        }
    }
    for bin in report.timeline.iter().step_by(report.timeline.len().div_ceil(24).max(1)) {
        println!("{:?} {:?}", bin.trainers_out, bin.receivers_in);
    }
    Ok(())
}
