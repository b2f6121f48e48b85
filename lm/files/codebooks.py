"""The codebooks of ggml's IQ types: constants of the format.

A codebook lists vectors of 4 or 8 numbers, each one of 3 or 8 levels; a file holds their indices.
The vectors stand in the order of the number whose little-endian digits are their levels, so that a
codebook is which of all vectors are in it: one bit each, in base 85. Codebooks with `even` hold
only vectors whose levels' indices sum to an even number, and spend no bits on the others.
Source: the `iq*_grid` tables of ggml-common.h (MIT licence).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A set of vectors.

    Attributes:
      levels: what a number of a vector may be.
      dims: numbers a vector.
      even: whether only vectors of even sum are counted.
      members: a bit for each vector counted, base 85.
    """

    levels: tuple[int, ...]
    dims: int
    even: bool
    members: bytes

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The vectors: float32 [vectors, dims], not writable."""
        base = len(self.levels)
        digits = np.arange(base**self.dims)[:, None] // base ** np.arange(self.dims) % base
        if self.even:
            digits = digits[digits.sum(axis=1) % 2 == 0]
        bits = np.frombuffer(base64.b85decode(self.members), np.uint8)
        chosen = np.unpackbits(bits, count=len(digits), bitorder="little").astype(bool)
        table = np.array(self.levels, np.float32)[digits[chosen]]
        table.setflags(write=False)
        return table


# The sign bits of eight numbers from seven: the eighth makes their number even.
EVEN_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)
EVEN_SIGNS.setflags(write=False)

# IQ4_NL and IQ4_XS.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# MXFP4 and NVFP4: twice the values of E2M1 (OCP Microscaling Formats 1.0).
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

CODEBOOKS: Mapping[str, Codebook] = {
    "IQ2_XXS": Codebook(
        (8, 25, 43),
        8,
        True,
        b"fA*xAAf`Y7AP5Es03ZNNm<3^iEC>WJ1i%0RfB<QNW&i>p00IC2AOrva0ANA{2vQ(HfCvEq03iSXK!Sn*0sue"
        b"&KmdS1000006CeNx00jU501yBG2mk;k00A)o06+u)01N;C005W(fdBvq00IaA000002!J2}03ZMW0000001y"
        b"BGz@$kOCP07yAPRs8fCvGA1OWg91Rw+e000310000cKmh;%0sufE0000200N{803ZPn00IC20RR912mk;802"
        b"lxP0000W00031AS3`F0000800002000002@n7QfB*mp004jhKmY&*00000U;qFh00000000000RR91000000"
        b"00000GI#*fB+x}0ssI20ssI2U<w2X03ZM$06+i&2oL~(0000000961000mG0000IBme*qfB*mp000010006A"
        b"0RR9101yBG0000000000KmY&`0000000000AOJuB0ssL3001BW00000AOHXW00000000000000000IC20ssI"
        b"2000000000",
    ),
    "IQ2_XS": Codebook(
        (8, 25, 43),
        8,
        True,
        b"|KGoP8~)FmGy&d(DG&ktn|EOXya^K`0GL1nfB^VYCP9EW0Rn&o5Fh~nK;hrKi4)*Wm;k}R1qcuTz?-l^0)Pn"
        b"+004j>00961Gav{c00jU50ssI22mk>8gb5HJOn?Lg00a;KAOM<x0RR99073vj5D)+W0F)sB0R#d706-7`K>z"
        b"?6z`yxZCcv980Sbs27ytl(w_ySV0TUzu00<F)1ONagKoJ1|LI4Q}00;m8006v66CePX0s{a52mk~C05~B6ga"
        b"DBM0DuGlKmb4hA_#~800BT400000000Pp2@pgOzyJUM000040ssMl00000AV2{CKmY&$000C401yBGAOHXWA"
        b"OJuF0C*E8zyN#!LIMB~AOL^?X$}Mk2p|9u000Oe0003%0s;^QAOZjY0000203<>aAP^7$0R#X60000WfB*^r"
        b"NdN!<KmY&+000310000W000625C8xG1ONm8upt5f0097i1OR9O1ONd700;np0000000000fB*sr3jhE}0ssI"
        b"o001xm0099",
    ),
    "IQ2_S": Codebook(
        (8, 25, 43),
        8,
        True,
        b"|KGoVQ~%BTHfP?%FHlAN`~T<L{BQr}P51(B!UT9<|4k7%FWQ6%5Jp1)fZ*S~f7j;!`!{dEmMH@!!29-Z-h_Y"
        b"iCQN`fVFCnz-{MUe0B^zs1Rx|pAOHZ~*Etde&WST&0z}Xf00a6qZ^8s<6DCjqFaZJr08j=@00?jb002M$f&d"
        b"^G!2kPyrp^2FZ{CD?(k2Xm|L@<t3IFCzoB(ga1PDO(&6^+r-h>Gd2uy$g006vy|K<(&H*dlOXcH!20Pt_#gb"
        b"DB_On?Aj0tEm7;7yna0l)+Z002Nh000P}d($RJfHz?R1OyTw5C9Nu!UPBaCO`xP0s;U400c|`00a;OfB*mh0"
        b"0062fOuQxMH#Sf-hc^M2TT9};9tB66W~pl01?0h3;+N?8886=hyf6Q00002FbEL)<V~0WWxzxL046{H0D#_v"
        b"2@nWOfB*nc1ONmC0GL1l000aCPyhe`00008P(@Av01^NMAOJvu1^^n+1PA~SNI(Dp000000ssIA2mk;O000O"
        b"e02mekKmY*",
    ),
    "IQ3_XXS": Codebook(
        (4, 12, 20, 28, 36, 44, 52, 62),
        4,
        True,
        b"w-W+jGc`dF7qgH+IRpR@Ab^Bm2_PT<06+i)&;SAfGjkXK69WJMGZ6qF0}%)a1pp8L00jsT1ONa400IF3GaCW"
        b"`HxU3DlY>D3Q2+o?06-uB0tf*>00000g8&2oF#`}J0}%`W69gb25Fh{m01yZu2?9U>K!5-O03ZMXgutKx000"
        b"0$0D%Ds2mk~C1ON~O00aUM00000G!Os)AOHan2?#&{Kp+4h0stTY5DEYw0uTTI000mG00aU600ayK00962fB"
        b"*ml0FVFx000C41OOla03ZMW0s#O39v~n900;p9AOIu)K_CDD009920|Wp701yBG00000",
    ),
    "IQ3_S": Codebook(
        (1, 3, 5, 7, 9, 11, 13, 15),
        4,
        False,
        b"r&l8gr3wX-7bA%x5C9?sqe&tWqzV8D2qFba5CwoD0f-U=2?78C6aYmCq5wb$Knef?00aO66#zvD01*HH7pnz"
        b"Q08j!1OA!JI0tEm;0i+QG2_OLkk_mzl0ssU7C=>t+L=gZ00to^I00IC2005ByPyhe`3Izfn0ssU7t5u2xDg}"
        b"Tk1&JgQ1Ofm6k^l;U0*C+-B?1%*1OY$*f&d950ssIc5CQ~%0SEvAg#ZEo03ZSYAOb)E2mt^91gZoolmZ9>Di"
        b"8_)0RRC+0R#aQ009610uhP<iXZ?82tot`00a>L0tFxh5I_J306+i$0ssI23IGKl000005d@J00s#O4gbD;92"
        b"qFLg3Lydr0e}Pn5DEn%000001pp9$0RR93pa22@000C400;mO0003103iSY2m$~A1Q7%Pkpw^xDg*)q00004"
        b"0Rjj?00;m8gaLp65CR|w5&!`NKmY&$00ck)015yA000001ONa46aWMO0000004e|q000310RVvj000mG00aO"
        b"K1Rw+f0T2QJ0RR91001BW2mk~C2><{P00031AOHXW0RR91015yA00000kpKli0T2WL1OgBMC;$Ke5<vn100I"
        b"C21ONae00;m8A_xHh00961000C41ONa41ONa6000000RR9100000",
    ),
    "IQ1": Codebook(
        (-1, 0, 1),
        8,
        False,
        b"RV5UKpaMcs2t_fdh9HWf8VD*N6opU}f*?diB^3pr0)ilj7yt-@paUwPh`Xu^kg5v+A^-}ijDnyDKv4)qA&7u"
        b"b6hcu5iZBS6pa_5}2t^?jg&;^mRR~1^EW)55iY5RmB&e#Q2;#2@2q-83paMcDswg0+fFKH+2)VkbAj+<ZqOP"
        b"hseCz7EyMhk5BD%`c4w3>Q03sl$in<Dd0tf&qO5mb9A|NZG0D(Y(s){HGA^{YIP!)n82}L1Pg`fxmBd9tcgn"
        b"}ScLQx2!APALE6ap#;xTu1FphyBB2!f($q5>$ZDhP!j2!b#OML+;WAryt6076j!MFA;-0E&Vt2%#_(1yB@%C"
        b"<sL%6onuH0wAg?03Z^vimoWAx}mD5Z~%e|2m&Y~0)zm907!tK>aZ%R!XS&fBI??wi;HfklCUbOa*K*Y3@RW<"
        b"gg_{YDhR3|$jqW5qOY2u=%@k!0stzghyWmfpo^lSD7v74f-(xazPP&n>!P45q6mr#DC(jBp)vvt`lRaK?<=S"
        b"-jlO>C`uBgo=6$-}Y5OPtzb5(;>EVhZ5URcogsKR#s0)Iw|GFgUgMb8LENJqm3ZyFl0xAdy;;Iq=0)i?ErXb"
        b"0JiI9RQ0HOelfD-_M2nYadimIx+0;ax-pvnS(YnLw2vgr_l5H70TC>7DA1ON(x0E&Vj2mzrWf~q;XA~J-a34"
        b"j;?ilSlyffPhh07W6Jf>0DfQ3$FaD5{4F5-JEqAru9m2trW^MFAiJpg^J`0Ehqxq6lh=Zn&zdfB+y0g5t;`A"
        b"qYfJ6hcu6iXat*P!xs=2&yV7fB*_YQ3ypLr~ptDLQx3fAc%qr7=kJYs-miju!{l;DykqTf`F<DC<rJ3sfYq1"
        b"puP(zxCn~6OR}#2x}^B7svuG*Xttm*=70(UC<r2IVt^nD0;;Mjs_LStprQx}5Fnt6A^?I807W4bg`f&RQ3yp"
        b"LsRjT_ssae501ypC6oM!SMIjUg00@GDtnwfL0062AC<?kD>Y@Swf=CG{=@bAFOGQxtMFFS+P!vK@2#6#Ih$s"
        b"p`2mnO^6a}CHKv4)q0R",
    ),
}
