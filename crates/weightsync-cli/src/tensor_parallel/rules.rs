//! What a layer does, told by its name: that of the field's own checkpoints. Names only, no shapes.

/// What a layer does, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Query,
    Key,
    Value,
    /// Row parallel over the heads that `Query` cuts.
    AttentionOutput,
    Gate,
    Up,
    Column,
    Row,
    Vocabulary,
}

/// The first rule whose name is the end of the module's path applies.
const RULES: &[(&str, Role)] = &[
    ("self_attn.q_proj", Role::Query),
    ("self_attn.k_proj", Role::Key),
    ("self_attn.v_proj", Role::Value),
    ("self_attn.o_proj", Role::AttentionOutput),
    ("mlp.gate_proj", Role::Gate),
    ("mlp.up_proj", Role::Up),
    ("mlp.down_proj", Role::Row),
    ("embed_tokens", Role::Vocabulary),
    ("lm_head", Role::Vocabulary),
    // BERT
    ("attention.self.query", Role::Query),
    ("attention.self.key", Role::Key),
    ("attention.self.value", Role::Value),
    ("attention.output.dense", Role::AttentionOutput),
    ("intermediate.dense", Role::Column),
    ("output.dense", Role::Row),
    ("word_embeddings", Role::Vocabulary),
];

/// Whether another tool has fused this module, in a way that the name does not tell.
pub(super) fn is_fused(name: &str) -> bool {
    ["qkv_proj", "gate_up_proj"].into_iter().any(|fused| ends_with_path(module_of(name), fused))
}

/// The path of the module: the name without `weight` or `bias`.
pub(super) fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}

fn ends_with_path(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// `None` for everything that is copied to every rank. Scales and the like of quantised layers have no rule.
pub(super) fn role_of(name: &str) -> Option<Role> {
    let (module, leaf) = name.rsplit_once('.')?;
    if !matches!(leaf, "weight" | "bias") {
        return None;
    }
    RULES.iter().find(|(end, _)| ends_with_path(module, end)).map(|&(_, role)| role)
}

/// A layer that is fused from others, one below the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fusion {
    pub(super) layer: &'static str,
    pub(super) parts: &'static str,
    pub(super) parts_count: usize,
}

/// The fused layer that this one becomes part of, and the position in it.
pub(super) fn fusion_of(role: Role) -> Option<(Fusion, usize)> {
    let qkv = Fusion { layer: "qkv_proj", parts: "q, k, v", parts_count: 3 };
    let gate_up = Fusion { layer: "gate_up_proj", parts: "gate, up", parts_count: 2 };
    match role {
        Role::Query => Some((qkv, 0)),
        Role::Key => Some((qkv, 1)),
        Role::Value => Some((qkv, 2)),
        Role::Gate => Some((gate_up, 0)),
        Role::Up => Some((gate_up, 1)),
        _ => None,
    }
}

/// The same kind of tensor of the layer `layer` beside this one: `a.q_proj.bias` -> `a.qkv_proj.bias`.
pub(super) fn sibling(name: &str, layer: &str) -> String {
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    match module.rsplit_once('.') {
        Some((block, _)) => format!("{block}.{layer}.{leaf}"),
        None => format!("{layer}.{leaf}"),
    }
}
