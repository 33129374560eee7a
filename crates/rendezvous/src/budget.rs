//! Decoding within a budget of memory.
//!
//! A frame's length bounds its bytes, not what they become: an element of a list can take one byte on the wire and two hundred
//! in memory. So every element is charged, with its size in memory, before it is read. What elements hold outside of
//! themselves is either elements again or text and bytes, which take no more memory than bytes on the wire.

use std::cell::Cell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor};

/// Bytes of elements that a frame may become, for each byte that it may have. Lists of the largest jobs take up to 6.
const MEMORY_PER_BYTE: usize = 8;

/// Decodes one message that is all of `bytes`, of a frame that may have `bytes_max`; the reason otherwise.
pub(crate) fn decode<'de, T: Deserialize<'de>>(bytes: &'de [u8], bytes_max: u32) -> Result<T, String> {
    let budget = (bytes_max as usize).saturating_mul(MEMORY_PER_BYTE);
    let left = Cell::new(Some(budget));
    let mut postcard = postcard::Deserializer::from_bytes(bytes);
    let decoded = T::deserialize(Charged { inner: &mut postcard, left: &left, is_list: false });
    match (decoded, postcard.finalize()) {
        _ if left.get().is_none() => Err(format!("its lists would take more than {budget} bytes of memory")),
        (Ok(message), Ok([])) => Ok(message),
        (Ok(_), Ok(rest)) => Err(format!("{} bytes after the message", rest.len())),
        (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
    }
}

/// A deserializer, or a part of one, whose elements are charged. Nothing is left once the budget was exceeded.
struct Charged<'a, T> {
    inner: T,
    left: &'a Cell<Option<usize>>,
    /// What comes is a list or a map, and not the fields of a struct, which are part of an element's size.
    is_list: bool,
}

impl<'a, T> Charged<'a, T> {
    fn wrap<U>(&self, inner: U) -> Charged<'a, U> {
        Charged { inner, left: self.left, is_list: false }
    }

    fn list<U>(&self, inner: U) -> Charged<'a, U> {
        Charged { is_list: true, ..self.wrap(inner) }
    }

    fn same<U>(&self, inner: U) -> Charged<'a, U> {
        Charged { is_list: self.is_list, ..self.wrap(inner) }
    }

    /// Charges the next element, of this type, if there is one to come.
    fn charge<V, E: serde::de::Error>(&self, to_come: Option<usize>) -> Result<(), E> {
        if !self.is_list || to_come == Some(0) {
            return Ok(());
        }
        self.left.set(self.left.get().and_then(|left| left.checked_sub(size_of::<V>().max(1))));
        self.left.get().map(|_| ()).ok_or_else(|| E::custom("too much memory"))
    }
}

macro_rules! forward {
    ($wrap:ident: $($method:ident $(($($argument:ident: $type:ty),*))?)*) => {$(
        fn $method<V: Visitor<'de>>(self $($(, $argument: $type)*)?, visitor: V) -> Result<V::Value, D::Error> {
            let visitor = self.$wrap(visitor);
            self.inner.$method($($($argument,)*)? visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Charged<'_, D> {
    type Error = D::Error;

    forward! { list: deserialize_any deserialize_seq deserialize_map }
    forward! {
        wrap: deserialize_bool deserialize_char deserialize_str deserialize_string deserialize_bytes deserialize_byte_buf
        deserialize_option deserialize_unit deserialize_identifier deserialize_ignored_any deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128 deserialize_u8
        deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64
        deserialize_unit_struct(name: &'static str) deserialize_newtype_struct(name: &'static str)
        deserialize_tuple(len: usize) deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
    }

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

macro_rules! forward_visits {
    ($($method:ident($type:ty))*) => {$(
        fn $method<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Charged<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    forward_visits! {
        visit_bool(bool) visit_char(char) visit_str(&str) visit_borrowed_str(&'de str) visit_string(String)
        visit_bytes(&[u8]) visit_borrowed_bytes(&'de [u8]) visit_byte_buf(Vec<u8>)
        visit_i8(i8) visit_i16(i16) visit_i32(i32) visit_i64(i64) visit_i128(i128)
        visit_u8(u8) visit_u16(u16) visit_u32(u32) visit_u64(u64) visit_u128(u128) visit_f32(f32) visit_f64(f64)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<V::Value, D::Error> {
        let value = self.wrap(value);
        self.inner.visit_some(value)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, value: D) -> Result<V::Value, D::Error> {
        let value = self.wrap(value);
        self.inner.visit_newtype_struct(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<V::Value, A::Error> {
        let elements = self.same(elements);
        self.inner.visit_seq(elements)
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<V::Value, A::Error> {
        let entries = self.same(entries);
        self.inner.visit_map(entries)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        let variant = self.wrap(variant);
        self.inner.visit_enum(variant)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Charged<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        let deserializer = self.wrap(deserializer);
        self.inner.deserialize(deserializer)
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Charged<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.charge::<S::Value, A::Error>(self.size_hint())?;
        let seed = self.wrap(seed);
        self.inner.next_element_seed(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Charged<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.charge::<S::Value, A::Error>(self.size_hint())?;
        let seed = self.wrap(seed);
        self.inner.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.charge::<S::Value, A::Error>(None)?;
        let seed = self.wrap(seed);
        self.inner.next_value_seed(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'a, 'de, A: EnumAccess<'de>> EnumAccess<'de> for Charged<'a, A> {
    type Error = A::Error;
    type Variant = Charged<'a, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let (seed, left) = (self.wrap(seed), self.left);
        self.inner.variant_seed(seed).map(|(value, inner)| (value, Charged { inner, left, is_list: false }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Charged<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.wrap(seed);
        self.inner.newtype_variant_seed(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(visitor);
        self.inner.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(visitor);
        self.inner.struct_variant(fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;
    use xfer_plan::{
        DType, DestinationParam, Manifest, Op, ParamMap, RailDecl, Rank, ReceiverManifest, RegionIndex,
        SourcePiece, TensorBox, TrainerManifest, TrainerRank, plan,
    };

    use super::*;
    use crate::protocol::{FRAME_BYTES_MAX, Holds, Join, MemberManifest, SessionId, ToController, World};

    #[derive(Debug, Clone, PartialEq, serde::Serialize, Deserialize)]
    enum Everything {
        Unit,
        New(Option<Box<i64>>),
        Pair(u8, f64),
        Fields { names: BTreeMap<u32, String>, lists: Vec<Vec<(u16, char)>>, bytes: Vec<u8>, word: [u8; 16] },
    }

    fn everything() -> impl Strategy<Value = Everything> {
        prop_oneof![
            Just(Everything::Unit),
            prop::option::of(any::<i64>()).prop_map(|value| Everything::New(value.map(Box::new))),
            (any::<u8>(), -1e9..1e9).prop_map(|(a, b)| Everything::Pair(a, b)),
            (
                prop::collection::btree_map(any::<u32>(), ".{0,20}", 0..10),
                prop::collection::vec(prop::collection::vec(any::<(u16, char)>(), 0..5), 0..5),
                prop::collection::vec(any::<u8>(), 0..50),
                any::<[u8; 16]>(),
            )
                .prop_map(|(names, lists, bytes, word)| Everything::Fields {
                    names,
                    lists,
                    bytes,
                    word
                }),
        ]
    }

    proptest! {
        /// With enough of a budget it decodes what postcard does, and fails where postcard fails.
        #[test]
        fn it_decodes_what_postcard_does(value in prop::collection::vec(everything(), 0..8), cut in any::<prop::sample::Index>()) {
            let bytes = postcard::to_allocvec(&value).unwrap();
            prop_assert_eq!(decode::<Vec<Everything>>(&bytes, 1 << 20).unwrap(), value);
            let cut = &bytes[..cut.index(bytes.len())];
            prop_assert_eq!(
                decode::<Vec<Everything>>(cut, 1 << 20).is_ok(),
                matches!(postcard::take_from_bytes::<Vec<Everything>>(cut), Ok((_, [])))
            );
        }

        /// What is decoded is never larger than the budget, and only what is larger is refused.
        #[test]
        fn lists_cost_their_memory(lens in prop::collection::vec(0..40usize, 0..40), bytes_max in 1..400u32) {
            let lists: Vec<Vec<u64>> = lens.iter().map(|&len| vec![0; len]).collect();
            let memory = size_of_val(&*lists) + lists.iter().map(|list| size_of_val(&**list)).sum::<usize>();
            let bytes = postcard::to_allocvec(&lists).unwrap();
            let fits = memory <= bytes_max as usize * MEMORY_PER_BYTE;
            prop_assert_eq!(decode::<Vec<Vec<u64>>>(&bytes, bytes_max).is_ok(), fits);
        }
    }

    fn join(manifest: MemberManifest) -> ToController {
        let (member, world) = (Rank::Trainer(TrainerRank(0)), World { trainers: 1, inference: 1 });
        let deadline = std::time::Duration::from_secs(1);
        ToController::Join(Box::new(Join {
            job: "j".into(),
            member,
            world,
            deadline,
            manifest,
            endpoint: Vec::new(),
            holds: Holds::Nothing,
            stages: false,
            session: SessionId::default(),
        }))
    }

    fn sized(rank: Vec<SourcePiece>) -> ToController {
        let (host, regions, rails) = (String::new(), vec![1 << 40], vec![RailDecl { bytes_per_second: 1 }]);
        join(MemberManifest::Trainer(TrainerManifest { host, regions, rails, pieces: rank }))
    }

    /// A list of elements that are as short as can be on the wire is refused long before it has the memory that it
    /// claims.
    #[test]
    fn elements_of_nothing_are_refused() {
        let empty = || SourcePiece {
            tensor: String::new(),
            dtype: DType::U8,
            shape: Vec::new(),
            bounds: TensorBox::new(&[], &[]).unwrap(),
            region: RegionIndex(0),
            offset: 0,
        };
        let one = sized(vec![empty()]).encoded_bytes();
        let each = sized(vec![empty(); 2]).encoded_bytes() - one;
        let in_memory = size_of::<SourcePiece>() as u64;
        assert!(in_memory > 10 * each, "a piece of {each} bytes takes {in_memory}: is the budget needed?");
        let bytes = postcard::to_allocvec(&sized(vec![empty(); 5000])).unwrap();
        let bytes_max = bytes.len() as u32;
        let error = decode::<ToController>(&bytes, bytes_max).unwrap_err();
        assert!(error.contains("bytes of memory"), "{error}");
        decode::<ToController>(&bytes, FRAME_BYTES_MAX).unwrap();
    }

    /// Manifests and plans of real shapes stay below the budget at any size: each of their elements does.
    #[test]
    fn honest_lists_fit() {
        let layers = 0..200u64;
        let name = |layer: u64| format!("model.layers.{layer}.mlp.experts.17.gate_proj.weight");
        let pieces = layers.clone().map(|layer| SourcePiece {
            tensor: name(layer),
            dtype: DType::BF16,
            shape: vec![2048, 7168],
            bounds: TensorBox::new(&[0, 0], &[2048, 7168]).unwrap(),
            region: RegionIndex(0),
            offset: layer * (2048 * 7168 * 2),
        });
        let params = layers.clone().map(|layer| DestinationParam {
            name: name(layer),
            dtype: DType::BF16,
            shape: vec![2048, 7168],
            region: RegionIndex(0),
            offset: layer * (2048 * 7168 * 2),
            map: Arc::new(ParamMap::tensor(name(layer))),
            priority: 0,
        });
        let (host, regions, rails) =
            ("host".to_owned(), vec![1 << 40], vec![RailDecl { bytes_per_second: 50_000_000_000 }]);
        let trainer = TrainerManifest {
            host,
            regions: regions.clone(),
            rails: rails.clone(),
            pieces: pieces.collect(),
        };
        let receiver = ReceiverManifest { host: "other".into(), regions, rails, params: params.collect() };
        for manifest in
            [MemberManifest::Trainer(trainer.clone()), MemberManifest::Inference(receiver.clone())]
        {
            let bytes = postcard::to_allocvec(&join(manifest)).unwrap();
            decode::<ToController>(&bytes, bytes.len() as u32).unwrap();
        }
        let manifest =
            Manifest { trainers: vec![trainer], receivers: vec![receiver], options: Default::default() };
        let parts = plan(&manifest).unwrap().parts(&manifest).unwrap();
        let bytes = postcard::to_allocvec(&parts.trainers[0].ops).unwrap();
        decode::<Vec<Op>>(&bytes, bytes.len() as u32).unwrap();
    }
}
