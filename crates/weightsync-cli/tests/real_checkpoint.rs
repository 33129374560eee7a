//! The same checks on a published model. Runs where `WEIGHTSYNC_REAL_CHECKPOINT` is the path of its safetensors file.

use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::reference::{param_names, verify_param};
use weightsync_cli::tensor_parallel::Layout;
use weightsync_cli::training::step_bytes;
use xfer_plan::{ParamMap, TensorBox};

/// What a rank would hold: rectangles that are read from the file, stepped as parts of the whole tensor.
fn received(checkpoint: &Checkpoint, map: &ParamMap, step: u64) -> Vec<u8> {
    let part = |name: &str, bounds: Option<&TensorBox>| {
        let tensor = checkpoint.get(name).unwrap();
        let whole = TensorBox::whole(&tensor.shape).unwrap();
        let bounds = bounds.unwrap_or(&whole);
        let mut all = checkpoint.read_all(name).unwrap();
        step_bytes(tensor.dtype, name, step, 0, &mut all);
        let mut bytes = vec![0; (bounds.volume().unwrap() * tensor.dtype.bytes()) as usize];
        checkpoint.read_box(name, bounds, &mut bytes).unwrap();
        assert!(weightsync_cli::training::advance_box(
            tensor.dtype,
            name,
            &tensor.shape,
            bounds,
            (0, step),
            &mut bytes
        ));
        if *bounds == whole {
            assert!(bytes == all, "{name}");
        }
        bytes
    };
    match map {
        ParamMap::Tensor(name) => part(name, None),
        ParamMap::Shaped { of, .. } => received(checkpoint, of, step),
        ParamMap::Slice { of, bounds } => match &**of {
            ParamMap::Shaped { of, .. } => match &**of {
                ParamMap::Tensor(name) => part(name, Some(bounds)),
                _ => panic!("shapes are of tensors"),
            },
            _ => panic!("slices are of shaped tensors"),
        },
        ParamMap::Concat { dim: 0, parts } => {
            parts.iter().flat_map(|part| received(checkpoint, part, step)).collect()
        }
        other => panic!("the layout makes no {other:?}"),
    }
}

#[test]
fn a_published_model_is_laid_out_and_verified() {
    let Some(path) = std::env::var_os("WEIGHTSYNC_REAL_CHECKPOINT") else {
        println!("skipped: WEIGHTSYNC_REAL_CHECKPOINT is not set");
        return;
    };
    let checkpoint = Checkpoint::open(path.as_ref()).unwrap();
    println!(
        "{} tensors, {} bytes, {:?}",
        checkpoint.tensors().len(),
        checkpoint.bytes(),
        checkpoint.heads()
    );
    assert!(checkpoint.bytes() > 0);
    for tp in [1, 2, 3, 4] {
        let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp).unwrap();
        println!("{layout}");
        for rank in 0..tp {
            let params = layout.params(rank).unwrap();
            assert_eq!(
                params.iter().map(|param| param.name.as_str()).collect::<Vec<_>>(),
                param_names(&checkpoint)
            );
            for param in params {
                let bytes = received(&checkpoint, &param.map, 2);
                let verified = verify_param(&checkpoint, &param.name, (tp, rank), 2, &mut |offset, found| {
                    found.copy_from_slice(&bytes[offset as usize..][..found.len()]);
                });
                assert_eq!(verified.unwrap(), param.bytes(), "{}", param.name);
            }
        }
    }
}
