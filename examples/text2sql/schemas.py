"""The databases of the example: tables, columns, what may stand in them, and the split by schema.

A column's kind says which questions it can serve: `name` (what a row is called), `text` (a category), `num`, `date`, `id`, `ref`.
Every literal belongs either to training or to the held-out questions, decided here, before any row exists.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

Kind = Literal["id", "name", "text", "num", "date", "ref"]
Language = Literal["en", "zh"]

HELD_OUT_SCHEMAS = ("football", "music", "旅游")
HELD_OUT_MONTHS = (4, 8, 12)
HELD_OUT_YEARS = (2021,)
YEARS = (2018, 2019, 2020, 2021, 2022, 2023, 2024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    name: str
    kind: Kind
    values: tuple[str, ...] = ()  # literals as a question writes them
    to: str = ""  # ref: the table whose first column it names

    @property
    def noun(self) -> str:
        return self.name.replace("_", " ")

    @property
    def sql_type(self) -> str:
        return {"id": "INTEGER PRIMARY KEY", "num": "INTEGER", "ref": "INTEGER", "date": "DATE"}.get(self.kind, "TEXT")

    def literals(self, *, held_out: bool) -> list[str]:
        """The values that one side of the split may use: the last two texts, every fourth number, three months are held out."""
        if self.kind in ("name", "text"):
            return list(self.values[-2:] if held_out else self.values[:-2])
        if self.kind == "num":
            return [v for i, v in enumerate(self.values) if (i % 4 == 3) == held_out]
        if self.kind == "date":
            days = [datetime.date(y, m, d) for y in YEARS for m in range(1, 13) for d in (1, 10, 15, 20)]
            return [day.isoformat() for day in days if (day.month in HELD_OUT_MONTHS) == held_out]
        raise ValueError(f"no literal for a column of kind {self.kind}")

    def sql(self, literal: str) -> str:
        return literal if self.kind in ("num", "id", "ref") else f"'{literal}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str
    noun: str
    plural: str
    columns: tuple[Column, ...]

    def of(self, *kinds: Kind) -> list[Column]:
        return [column for column in self.columns if column.kind in kinds]

    @property
    def line(self) -> str:
        """How a prompt shows the table."""
        return f"{self.name}({', '.join(column.name for column in self.columns)})"

    @property
    def ddl(self) -> str:
        parts = [f"{c.name} {c.sql_type}" + (f" REFERENCES {c.to}" if c.to else "") for c in self.columns]
        return f"CREATE TABLE {self.name} ({', '.join(parts)});"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    name: str
    language: Language
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)


def plural(noun: str) -> str:
    """English plural of a noun, well enough for the nouns used here."""
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


VALUES = {
    "person": "Alice,Bruno,Carla,David,Elena,Frank,Grace,Henry,Irene,Jonas,Karen,Louis,Maria,Nadia,Oscar,Paula",
    "title": "Sunrise,Blue River,The Garden,Old Harbor,Winter Light,Silver Road,Night Train,Stone Bridge,Quiet Lake,Red Door",
    "city": "Paris,London,Berlin,Madrid,Rome,Oslo,Vienna,Lisbon,Dublin,Prague",
    "country": "France,Japan,Spain,Italy,Brazil,Canada,India,Kenya,Norway,Mexico",
    "人名": "王芳,李伟,张敏,刘洋,陈静,杨磊,赵娜,黄强,周杰,吴丽",
    "城市": "北京,上海,广州,杭州,成都,武汉,南京,西安",
    "书": "红楼梦,西游记,三国演义,水浒传,围城,家,活着,边城",
}


def columns(spec: str) -> tuple[Column, ...]:
    """Columns from a line like `id; title=@title; genre:poetry,history; price#5..95/5; publish_date~; author_id>author`.

    `=` a name, `:` a category, `#` a number (first..last/step), `~` a date, `>` a reference, nothing the primary key;
    `@x` stands for the value list x.
    """
    made = []
    for part in spec.split(";"):
        part = part.strip()
        mark = next((m for m in "=:#~>" if m in part), "")
        name, _, rest = part.partition(mark) if mark else (part, "", "")
        if mark == "#":
            span, _, step = rest.partition("/")
            first, last = span.split("..")
            values = tuple(str(v) for v in range(int(first), int(last) + 1, int(step)))
            made.append(Column(name=name, kind="num", values=values))
        elif mark == "~":
            made.append(Column(name=name, kind="date"))
        elif mark == ">":
            made.append(Column(name=name, kind="ref", to=rest))
        elif mark:
            values = tuple((VALUES[rest[1:]] if rest.startswith("@") else rest).split(","))
            made.append(Column(name=name, kind="name" if mark == "=" else "text", values=values))
        else:
            made.append(Column(name=name, kind="id"))
    return tuple(made)


def schema(name: str, language: Language, tables: dict[str, str]) -> Schema:
    """A schema from table specs; an English table may be called `orders (order)`: its name, then its noun."""
    made = []
    for title, spec in tables.items():
        table, _, noun = title.partition(" (")
        noun = noun.rstrip(")") or table
        many = plural(noun) if language == "en" else noun
        made.append(Table(name=table, noun=noun, plural=many, columns=columns(spec)))
    return Schema(name=name, language=language, tables=tuple(made))


SCHEMAS = (
    schema("library", "en", {
        "author": "id; name=@person; country:@country; birth_year#1930..2000/5",
        "book": "id; title=@title; genre:poetry,history,fantasy,crime,travel,science,drama,cooking; price#5..95/5; "
                "pages#80..900/20; author_id>author",
        "loan": "id; book_id>book; loan_date~; days#3..60/3",
    }),
    schema("shop", "en", {
        "customer": "id; name=@person; city:@city; age#18..80/2",
        "product": "id; name=lamp,chair,desk,kettle,phone,camera,clock,mirror,sofa,radio; "
                   "category:toys,garden,kitchen,sports,office,music,beauty,pets; price#5..500/5; stock#10..400/10",
        "orders (order)": "id; customer_id>customer; product_id>product; quantity#1..20/1; order_date~",
    }),
    schema("school", "en", {
        "student": "id; name=@person; club:chess,drama,music,robotics,debate,art,tennis,hiking; age#10..25/1; score#40..100/2",
        "course": "id; title=Algebra,Biology,Geometry,Grammar,Logic,History,Poetry,Statistics; "
                  "subject:math,english,science,history,arts,sports,coding; credits#1..12/1",
        "enrollment": "id; student_id>student; course_id>course; enroll_date~",
    }),
    schema("company", "en", {
        "department": "id; name=Sales,Finance,Research,Support,Legal,Design,Audit,Training; city:@city; budget#100..900/20",
        "employee": "id; name=@person; job:clerk,engineer,manager,analyst,driver,designer,lawyer,nurse; "
                    "salary#1000..9000/250; hire_date~; department_id>department",
    }),
    schema("cinema", "en", {
        "director": "id; name=@person; country:@country; awards#1..20/1",
        "movie": "id; title=@title; genre:comedy,drama,horror,action,western,romance,mystery,musical; rating#10..100/5; "
                 "minutes#60..200/5; release_date~; director_id>director",
    }),
    schema("airline", "en", {
        "airport": "id; name=Alpha,Bravo,Delta,Echo,Kilo,Lima,Oscar,Tango; city:@city; gates#5..80/5",
        "flight": "id; code=AB12,CD34,EF56,GH78,JK90,LM21,NP43,QR65; airline:Nordic,Pacific,Atlas,Condor,Swift,Orient,Polar; "
                  "price#50..950/25; seats#40..300/10; flight_date~; airport_id>airport",
    }),
    schema("hospital", "en", {
        "doctor": "id; name=@person; specialty:surgery,cardiology,dermatology,pediatrics,neurology,dentistry,urology; "
                  "fee#40..400/20",
        "patient": "id; name=@person; city:@city; age#1..95/2",
        "visit": "id; doctor_id>doctor; patient_id>patient; visit_date~; cost#20..600/20",
    }),
    schema("hotel", "en", {
        "hotel": "id; name=Plaza,Grand,Royal,Astoria,Central,Lakeside,Ocean,Summit; city:@city; stars#1..10/1",
        "room": "id; code=A1,A2,B1,B2,C1,C2,D1,D2; type:single,double,suite,studio,family,deluxe; price#40..400/10; "
                "beds#1..8/1; hotel_id>hotel",
    }),
    schema("football", "en", {
        "team": "id; name=Lions,Eagles,Wolves,Tigers,Sharks,Hawks,Bears,Bulls; city:@city; points#5..95/5",
        "player": "id; name=@person; position:keeper,defender,striker,winger,midfielder,captain,sweeper; goals#1..40/1; "
                  "age#17..39/1; birth_date~; team_id>team",
    }),
    schema("music", "en", {
        "artist": "id; name=@person; country:@country; fans#10..900/10",
        "album": "id; title=@title; style:rock,jazz,folk,blues,soul,metal,disco,opera; sales#10..900/10; "
                 "release_date~; artist_id>artist",
    }),
    schema("图书", "zh", {
        "作者": "编号; 姓名=@人名; 城市:@城市; 年龄#20..90/5",
        "图书": "编号; 书名=@书; 类别:小说,历史,科学,艺术,儿童,经济,诗歌,教育; 价格#5..95/5; 出版日期~; 作者编号>作者",
    }),
    schema("公司", "zh", {
        "部门": "编号; 名称=销售部,财务部,研发部,人事部,法务部,市场部; 城市:@城市; 人数#5..80/5",
        "员工": "编号; 姓名=@人名; 职位:经理,会计,司机,秘书,程序员,设计师,销售; 工资#3000..9000/500; 入职日期~; 部门编号>部门",
    }),
    schema("商店", "zh", {
        "顾客": "编号; 姓名=@人名; 城市:@城市; 年龄#18..80/2",
        "商品": "编号; 名称=台灯,水壶,书包,手机,雨伞,毛巾,桌子,椅子; 类别:食品,文具,家电,玩具,服装,日用; 价格#5..500/5; 库存#10..400/10",
        "订单": "编号; 顾客编号>顾客; 商品编号>商品; 数量#1..20/1; 日期~",
    }),
    schema("学校", "zh", {
        "教师": "编号; 姓名=@人名; 科目:数学,语文,英语,物理,化学,音乐,体育; 工龄#1..40/1",
        "学生": "编号; 姓名=@人名; 班级:一班,二班,三班,四班,五班,六班; 年龄#6..18/1; 成绩#40..100/2; 入学日期~; 教师编号>教师",
    }),
    schema("影院", "zh", {
        "电影": "片名=红日,天路,大海,小城,花木兰,白蛇,春天,长江; "
              "类型:喜剧,动作,爱情,战争,科幻,动画,历史; 评分#10..100/5; 年份#1990..2024/1",
    }),
    schema("餐馆", "zh", {
        "菜": "菜名=豆腐,米饭,面条,汤,鱼,饺子,包子,鸡; 口味:甜,辣,酸,咸,苦,麻,清淡,香; 价格#5..95/5; 销量#10..400/10",
    }),
    schema("旅游", "zh", {
        "镇": "编号; 镇名=东河镇,西山镇,南湖镇,北桥镇,青石镇,白云镇; 人口#1000..9000/500; 面积#10..200/10",
        "景点": "编号; 名称=古塔,花园,石桥,茶山,湖心岛,老街; 等级:一级,二级,三级,四级,五级; 票价#5..200/5; 开放日期~; 镇编号>镇",
    }),
)  # fmt: skip
