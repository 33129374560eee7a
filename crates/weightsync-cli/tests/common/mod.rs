//! Small checkpoints for tests, and in [`job`] runs of the real program.
#![allow(dead_code, unreachable_pub)] // each test uses a part

pub mod job;

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use weightsync_cli::checkpoint::MODEL_FILE;
use weightsync_cli::synthetic::{Shape, ensure};

/// Writes a safetensors file with made-up bytes, different in every tensor.
pub fn write_tensors(path: &Path, tensors: &[(String, Dtype, Vec<usize>)]) {
    let data: Vec<Vec<u8>> =
        tensors.iter().map(|(name, dtype, shape)| made_up(name, *dtype, shape)).collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape), data)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

/// The bytes that `write_tensors` writes.
pub fn made_up(name: &str, dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let seed = name.bytes().fold(17u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    (0..bytes as u32).map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Writes a file with this header and so many bytes of data.
pub fn write_raw(path: &Path, header: &str, data_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    std::fs::write(path, bytes).unwrap();
}

/// BERT's names: two layers, 6 heads of 4, sizes that divide by little.
pub fn bert() -> Vec<(String, Dtype, Vec<usize>)> {
    let mut tensors = vec![
        ("embeddings.word_embeddings.weight".to_owned(), Dtype::F32, vec![53, 24]),
        ("embeddings.position_embeddings.weight".to_owned(), Dtype::F32, vec![16, 24]),
        ("embeddings.position_ids".to_owned(), Dtype::I64, vec![1, 16]),
        ("embeddings.LayerNorm.weight".to_owned(), Dtype::F32, vec![24]),
        ("pooler.dense.weight".to_owned(), Dtype::F32, vec![24, 24]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("attention.self.query", vec![24, 24]),
            ("attention.self.key", vec![24, 24]),
            ("attention.self.value", vec![24, 24]),
            ("attention.output.dense", vec![24, 24]),
            ("attention.output.LayerNorm", vec![24]),
            ("intermediate.dense", vec![50, 24]),
            ("output.dense", vec![24, 50]),
            ("output.LayerNorm", vec![24]),
        ] {
            let name = format!("encoder.layer.{layer}.{name}");
            tensors.push((format!("{name}.bias"), Dtype::F32, vec![shape[0]]));
            tensors.push((format!("{name}.weight"), Dtype::F32, shape));
        }
    }
    tensors
}

/// A folder with the synthetic checkpoint that is made for tests.
pub fn tiny() -> tempfile::TempDir {
    synthetic(&Shape::tiny())
}

/// Linear layers whose halves end where blocks of 128 x 128 do, and whose thirds do not.
pub fn blocks() -> Shape {
    let name = "blocks".into();
    Shape { name, hidden: 200, query_heads: 8, key_value_heads: 8, head_dim: 32, inner: 512, ..Shape::tiny() }
}

/// A folder with a synthetic checkpoint of this shape.
pub fn synthetic(shape: &Shape) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    ensure(folder.path(), shape, 1, &mut |_, _| {}).unwrap();
    folder
}

/// A folder with a checkpoint of these tensors.
pub fn checkpoint_of(tensors: &[(&str, Dtype, &[usize])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensors: Vec<_> =
        tensors.iter().map(|(name, dtype, shape)| ((*name).to_owned(), *dtype, shape.to_vec())).collect();
    write_tensors(&folder.path().join(MODEL_FILE), &tensors);
    folder
}
